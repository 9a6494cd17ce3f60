"""Numbers as answers: which texts are a number, which number, and which are none."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task.numbers import LONGEST, UNIT, number_of, number_text

NUMBERS = [
    ("42", "42"),
    (" 42\n", "42"),  # white space around it
    ("42.", "42"),  # one full stop ends a sentence
    ("42 .", "42"),
    ("4.2.", "21/5"),
    ("0", "0"),
    ("-0", "0"),  # there is one zero
    ("007", "7"),
    ("+7", "7"),
    ("-7", "-7"),
    ("\u22127", "-7"),  # the typographic minus
    ("3.5", "7/2"),
    ("3.50", "7/2"),  # zeros behind the point change nothing
    (".5", "1/2"),
    ("-.5", "-1/2"),
    ("0.1", "1/10"),  # exactly: the float is 0.1000000000000000055
    ("0.30000000000000004", "7500000000000001/25000000000000000"),
    ("1,234", "1234"),
    ("1,234,567.25", "4938269/4"),
    ("-1,250", "-1250"),
    ("12,345", "12345"),
    ("123,456", "123456"),
    ("1\u00a0234", "1234"),  # spaces that do not break
    ("1\u2009234\u2009567", "1234567"),
    ("1\u202f234.5", "2469/2"),
    ("1/2", "1/2"),
    ("2/4", "1/2"),
    ("-3/4", "-3/4"),
    ("1 / 2", "1/2"),
    ("6/3", "2"),
    ("0/5", "0"),
    ("1,000/3", "1000/3"),
    ("2 1/2", "5/2"),  # a mixed number
    ("-2 1/2", "-5/2"),
    ("1/2.", "1/2"),
    ("50%", "1/2"),
    ("50 %", "1/2"),
    ("12.5%", "1/8"),
    ("-5%", "-1/20"),
    ("100%", "1"),
    ("1/2%", "1/200"),
    ("1e3", "1000"),
    ("1.5E-3", "3/2000"),
    ("2e+2", "200"),
    ("6.022e23", "602200000000000000000000"),
    ("9" * LONGEST, "9" * LONGEST),
]

NO_NUMBERS = [
    ("", "nothing"),
    (" ", "blank"),
    (".", "a full stop alone"),
    ("-", "a sign alone"),
    ("%", "a percent sign alone"),
    ("e5", "an exponent alone"),
    ("...", "the prompt's placeholder"),
    ("number", "a word"),
    ("forty-two", "a number in words"),
    ("about 42", "more than the number"),
    ("42 or 43", "two numbers"),
    ("42 43", "two numbers without a word"),
    ("42 430", "a space may part two numbers"),
    ("42, 43", "a list"),
    ("41-43", "a range"),
    ("42..", "one full stop is forgiven, not two"),
    ("42!", "another mark"),
    ("42,", "a comma behind it"),
    ("1,5", "a decimal comma, or a group too short"),
    ("0,123", "a decimal comma: no group begins with 0"),
    ("1,23,456", "a group too short"),
    ("1234,567", "a first group too long"),
    ("1,2345", "a last group too long"),
    ("1,,234", "a group without digits"),
    (",234", "no first group"),
    ("1.234,5", "the other way round, as some languages write"),
    ("1.234.567", "full stops as separators"),
    ("1,234\u00a0567", "two kinds of separators"),
    ("1'234", "an apostrophe as separator"),
    ("1_234", "an underscore as separator"),
    ("1.2.3", "a version"),
    ("- 5", "a space behind the sign"),
    ("--5", "two signs"),
    ("+-5", "two signs"),
    ("\u00b15", "two numbers in one"),
    ("5-", "a sign behind it"),
    ("(5)", "an accountant's minus, or brackets"),
    ("1/0", "no number at all"),
    ("1/-2", "a sign below the line"),
    ("1.5/2", "a decimal above the line"),
    ("1/2/3", "two lines"),
    ("1//2", "an operator"),
    ("1 3/2", "a mixed number with more than a whole behind it"),
    ("2 1/2 3", "something behind a mixed number"),
    ("\u00bd", "a sign for a fraction: written with digits"),
    ("1\u20442", "a slash of another kind"),
    ("50%%", "two percent signs"),
    ("50 percent", "a word is a unit, which a flag must name"),
    ("5\u2030", "per thousand"),
    ("1e", "no exponent"),
    ("1e999", "an exponent beyond 99"),
    ("1e99", "longer than any answer when it is written out"),
    ("1e1.5", "a broken exponent"),
    ("3 x 10^5", "a formula"),
    ("2+2", "a sum"),
    ("= 42", "an equation"),
    ("x = 42", "an equation"),
    ("$42", "a unit that no flag names"),
    ("42 km", "a unit that no flag names"),
    ("**42**", "markup"),
    ("\\boxed{42}", "LaTeX"),
    ("`42`", "markup"),
    ('"42"', "quotes"),
    ("0x2A", "another base"),
    ("NaN", "not a number"),
    ("inf", "not finite"),
    ("\u0664\u0662", "digits of another script"),
    ("\uff14\uff12", "full-width digits"),
    ("4\u200b2", "a zero-width space inside"),
    ("4 2", "a space inside"),
    ("4\n2", "a line break inside"),
    ("9" * (LONGEST + 1), "longer than any answer"),
]

WITH_UNITS = [  # text, units, number
    ("$18", "$", "18"),
    ("$ 18", "$", "18"),
    ("-$18", "$", "-18"),
    ("$-18", "$", "-18"),
    ("-$-18", "$", None),  # two signs
    ("$18.50", "$", "37/2"),
    ("$1,000.", "$", "1000"),  # with a full stop
    ("18 dollars", "$,dollars", "18"),
    ("18dollars", "$,dollars", "18"),
    ("$18 dollars", "$,dollars", None),  # one unit is enough
    ("18 Dollars", "$,dollars", None),  # spelled as the flag says: mW is not MW
    ("18 euros", "$,dollars", None),
    ("18", "$,dollars", "18"),  # the unit may be missing
    ("5 km/h", "km,km/h", "5"),
    ("5 m\u00b2", "m\u00b2", "5"),
    ("20 \u00b0C", "\u00b0C", "20"),
    ("5 kg.", "kg", "5"),
    ("50%", "%", "50"),  # a unit of that name is no hundredth
    ("50", "%", "50"),
    ("1/2 km", "km", "1/2"),
    ("km", "km", None),  # a unit alone
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_a_number_is_read_exactly(text, number):
    assert number_of(text) == Fraction(number)


@pytest.mark.parametrize(("text", "why"), NO_NUMBERS)
def test_any_other_text_is_no_number(text, why):
    assert number_of(text) is None, why


@pytest.mark.parametrize(("text", "units", "number"), WITH_UNITS)
def test_one_unit_of_the_flag_may_stand_beside_a_number(text, units, number):
    assert number_of(text, units.split(",")) == (number and Fraction(number))


def test_the_table_of_forms_is_long():
    assert len({text for text, *_ in (*NUMBERS, *NO_NUMBERS, *WITH_UNITS)}) >= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [("42", "42"), ("-42", "-42"), ("7/2", "3.5"), ("-1/8", "-0.125"), ("1/3", "1/3"), ("1/200", "0.005"), ("0", "0")],
)
def test_a_number_has_one_canonical_spelling(number, text):
    assert number_text(Fraction(number)) == text


@settings(deadline=None)  # the cores are shared
@given(st.fractions(max_denominator=10_000, min_value=-(10**9), max_value=10**9))
def test_the_canonical_spelling_is_read_back(number):
    assert number_of(number_text(number)) == number


@settings(deadline=None)  # the cores are shared
@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_decimals_and_thousands_are_those_that_python_writes(digits, places):
    # The oracle: Python's own formatting of an exact decimal.
    exact = Fraction(digits, 10**places)
    whole, rest = divmod(abs(digits), 10**places)
    written = f"{'-' * (digits < 0)}{whole:,}" + (f".{rest:0{places}}" if places else "")
    assert number_of(written) == exact


@settings(deadline=None)  # the cores are shared
@given(st.text(st.sampled_from("0123456789.,/%eE+- \u2212\u00a0$x"), max_size=80))
def test_any_text_is_read_or_refused_and_what_is_read_is_read_back(text):
    found = number_of(text, ["$"])
    assert found is None or number_of(number_text(found)) == found


def test_a_very_long_text_is_refused_at_once():
    for text in ("9" * 10**6, "1" + ",000" * 10**5, " " * 10**6 + "x", "1/" * 10**6):
        assert number_of(text) is None


@pytest.mark.parametrize("unit", ["$", "dollars", "km/h", "m\u00b2", "m2", "%", "\u00b0C", "per cent"])
def test_a_unit_is_any_text_that_does_not_begin_like_a_number(unit):
    assert UNIT.fullmatch(unit) and number_of(f"7 {unit}", [unit]) == 7


@pytest.mark.parametrize("unit", ["", "5", "-", "+x", ".m", "/h", " km", "<b>"])
def test_a_unit_that_begins_like_a_number_or_a_tag_is_none(unit):
    assert not UNIT.fullmatch(unit)
