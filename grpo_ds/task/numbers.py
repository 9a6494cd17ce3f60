"""Numbers as answers: one number, written alone, and compared exactly.

A number is a Fraction, never a float: 0.1 + 0.2 would not be 0.3. The forms are few, because a policy makes use of
every exception (docs/answers.md lists them): a text that could mean two numbers, such as 1,5 or 1.234,5, is none.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from grpo_ds.task.spelling import nfc

LONGEST = 64  # characters, as written and in the canonical spelling; int() takes quadratic time
SIGNS = ("+", "-", "\u2212")  # the last one is typographic
# Thousands are separated by commas or by spaces that do not break, all alike; "42 430" may be two numbers.
WHOLE = "[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:\u00a0[0-9]{3})+|(?:\u2009[0-9]{3})+|(?:\u202f[0-9]{3})+)|[0-9]+"
NUMBER = re.compile(
    rf"(?P<sign>[{''.join(map(re.escape, SIGNS))}])?"
    rf"(?:(?:(?P<mixed>[0-9]+) )?(?P<above>{WHOLE}) ?/ ?(?P<below>{WHOLE})"
    rf"|(?P<whole>{WHOLE})?(?:\.(?P<decimals>[0-9]+))?(?:[eE](?P<exponent>[+-]?[0-9]{{1,2}}))?)"
    r"(?P<percent> ?%)?"
)
# Before a number, or behind it; a unit that begins like a number would be a part of it.
UNIT = re.compile(r"[^\s0-9.,+\-\u2212/<>][^<>]*")


def number_of(text: str, units: Sequence[str] = ()) -> Fraction | None:
    """Return the number that the text is, without white space around it and one full stop; None for any other text.

    units: texts one of which may stand before or behind the number, spelled exactly so; with "%" among them 5% is 5.

    Example:
        >>> number_of("-1,250.50"), number_of("3/4"), number_of("$18", ["$"]), number_of("about 18")
        (Fraction(-2501, 2), Fraction(3, 4), Fraction(18, 1), None)
    """
    written = text.strip()
    if len(written) > LONGEST:
        return None
    exact = nfc(written)
    forms = (form for end in (exact, exact.removesuffix(".").rstrip()) for form in _without_unit(end, units))
    number = next((number for form in forms if (number := _read(form)) is not None), None)
    return None if number is None or len(number_text(number)) > LONGEST else number  # 1e99 is not read back


def number_text(number: Fraction) -> str:
    """Return the canonical spelling, which `number_of` reads back: a whole number, a decimal, or else a fraction."""
    below, twos, fives = number.denominator, 0, 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    places = max(twos, fives)
    if below > 1 or not places:
        return str(number)
    digits = str(abs(number.numerator) * 10**places // number.denominator).zfill(places + 1)
    return f"{'-' * (number < 0)}{digits[:-places]}.{digits[-places:]}"


def _without_unit(text: str, units: Sequence[str]) -> Iterator[str]:
    """Yield the text without each unit that it has, then as it is."""
    sign = text[:1] if text[:1] in SIGNS else ""
    for unit in map(nfc, units):
        if text.endswith(unit):
            yield text[: -len(unit)].rstrip()
        if text.startswith(sign + unit):  # -$5; $-5 is read, too
            yield sign + text[len(sign + unit) :].lstrip()
    yield text


def _read(text: str) -> Fraction | None:
    found = NUMBER.fullmatch(text)
    if not found or not (found["above"] or found["whole"] or found["decimals"]):
        return None
    if found["above"]:
        above, below = _digits(found["above"]), _digits(found["below"])
        if not below or (found["mixed"] and above >= below):  # 1 3/2 is no mixed number
            return None
        size = int(found["mixed"] or 0) + Fraction(above, below)
    else:
        decimals = found["decimals"] or ""
        size = Fraction(_digits(f"{found['whole'] or ''}{decimals}"), 10 ** len(decimals))
        size *= Fraction(10) ** int(found["exponent"] or 0)
    size /= 100 if found["percent"] else 1
    return -size if found["sign"] in SIGNS[1:] else size


def _digits(text: str) -> int:
    return int(re.sub("[^0-9]", "", text))
