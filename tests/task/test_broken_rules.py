"""The rule that a completion breaks is named, for every completion that earns nothing for its answer."""

import pytest

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import CUT, broken_rule, rules_line
from tests.faults.ill_formed import ANSWERED, BENIGN, GOOD, ILL_FORMED, REASONED

FORMAT = AnswerFormat(("yes", "no"))
RULES = [  # completion, the first rule that it breaks
    (GOOD, ""),
    (f" {REASONED}\n<answer>NO.</answer>", ""),  # wrong is not ill-formed
    ("", "nothing but white space"),
    ("\n ", "nothing but white space"),
    ("The answer is yes.", "no tags"),
    (f"{REASONED}<|im_end|>{ANSWERED}", "a control token in it"),
    (f"{REASONED}<Answer>yes</Answer>", "a misspelled tag"),
    (f"{GOOD}<answer>no</answer>", "more than one answer"),
    (f"{REASONED}{GOOD}", "a tag twice"),
    (ANSWERED, "no <reasoning>"),
    ("<reasoning>It fell.", "no </reasoning>"),
    (REASONED, "no <answer>"),
    (f"{REASONED}<answer>yes", "no </answer>"),
    (ANSWERED + REASONED, "tags out of order"),
    (f"<reasoning>...</reasoning>{ANSWERED}", "empty reasoning"),
    (f"Well: {GOOD}", "text before the reasoning"),
    (f"{REASONED} So: {ANSWERED}", "text between reasoning and answer"),
    (f"{GOOD} I hope this helps.", "text after the answer"),
    (f"{REASONED}<answer>maybe</answer>", "an answer that is not yes or no"),
    (FORMAT.write(*FORMAT.placeholders), "the prompt's placeholder copied"),
    (FORMAT.write(f" {FORMAT.placeholders[0].upper()}. ", "yes"), "the prompt's placeholder copied"),
    (FORMAT.write("It fell.", FORMAT.placeholders[1]), "the prompt's placeholder copied"),
]


@pytest.mark.parametrize(("completion", "rule"), RULES)
def test_the_first_broken_rule_is_named(completion, rule):
    assert broken_rule(completion, FORMAT) == rule


@pytest.mark.parametrize(("completion", "rule"), [(GOOD, ""), ("", CUT), ("<reasoning>It", CUT)])
def test_a_completion_cut_before_its_answer_is_called_cut(completion, rule):
    assert broken_rule(completion, FORMAT, cut=True) == rule


def test_where_no_form_is_asked_for_only_a_cut_is_named():
    form = AnswerFormat(kind="none")
    assert [broken_rule("La la.", form, cut=cut) for cut in (False, True)] == ["", CUT]


def test_rules_are_counted_the_most_common_first():
    assert rules_line(["no tags", "", CUT, CUT]) == f"2 x {CUT}; 1 x no tags" and rules_line(["", ""]) == ""


def test_every_ill_formed_completion_breaks_a_rule_and_no_benign_one_does():
    assert [why for why, completion in ILL_FORMED if not broken_rule(completion, FORMAT)] == []
    assert [why for why, completion in BENIGN if broken_rule(completion, FORMAT)] == []
