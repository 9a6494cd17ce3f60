"""Names of the rule of the answer contract that a completion breaks: for people, never for rewards."""

import re
from collections import Counter
from collections.abc import Iterable

from grpo_ds.task.answers import CONTROL, AnswerFormat, is_copy
from grpo_ds.task.spelling import nfc

CUT = "cut at --max_completion_length"
MOST_RULES = 6  # that a line names


def rules_line(rules: Iterable[str]) -> str:
    """Count rules in a line, the most common first; "" for none. Empty ones are left out.

    Example:
        >>> rules_line(["no tags", "", "empty reasoning", "no tags"])
        '2 x no tags; 1 x empty reasoning'
    """
    return "; ".join(f"{count} x {rule}" for rule, count in Counter(filter(None, rules)).most_common(MOST_RULES))


def broken_rule(completion: str, answer_format: AnswerFormat, *, cut: bool = False) -> str:
    """Return the first rule that a completion breaks, in a few words; "" if it is well-formed.

    cut: it has not ended by itself. If no answer is right, no form is asked for, and only this is said.

    Example:
        >>> broken_rule("<reasoning></reasoning><answer>yes</answer>", AnswerFormat())
        'empty reasoning'
    """
    if answer_format.kind == "none" or answer_format.parse(completion).well_formed:
        return CUT * (cut and answer_format.kind == "none")
    if cut:
        return CUT
    pieces = re.split(f"({answer_format.tag_pattern})", nfc(completion), flags=re.IGNORECASE)
    texts, tags = pieces[0::2], pieces[1::2]  # texts[i] is the text before tags[i]
    wanted = (*answer_format.reasoning_pair, *answer_format.answer_pair)
    missing = [tag for tag in wanted if tag not in tags]
    rules = (
        (not completion.strip(), "nothing but white space"),
        (not tags, "no tags"),
        (any(re.fullmatch(CONTROL, tag) for tag in tags), "a control token in it"),
        (not set(tags) <= set(wanted), "a misspelled tag"),
        (tags.count(answer_format.answer_pair[0]) > 1, "more than one answer"),
        (len(set(tags)) < len(tags), "a tag twice"),
        (missing, f"no {missing[0] if missing else ''}"),
        (tuple(tags) != wanted, "tags out of order"),
        (any(map(is_copy, texts[1:4:2], answer_format.placeholders)), "the prompt's placeholder copied"),
        (not any(map(str.isalnum, "".join(texts[1:2]))), "empty reasoning"),
        ("".join(texts[:1]).strip(), "text before the reasoning"),
        ("".join(texts[2:3]).strip(), "text between reasoning and answer"),
        ("".join(texts[4:]).strip(), "text after the answer"),
        (True, f"an answer that is not {answer_format.wanted}"),
    )
    return next(rule for broken, rule in rules if broken)
