"""A run that learns nothing says so, once: its rewards are equal, or no completion is well-formed, for some steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import broken_rule, rules_line
from grpo_ds.task.grading import is_right
from grpo_ds.training.rollout import Rollout

FLAT_STEPS = 5  # in a row; fewer happen by chance with few groups a step


def flat_rewards(steps: Sequence[Mapping[str, Any]], rollout: Rollout, answer_format: AnswerFormat) -> str:
    """Return a warning at the last of the first FLAT_STEPS flat steps in a row, "" at any other step.

    steps: metrics of all steps so far, which a resumed run has too. rollout: the last step's on this rank.
    """
    if not (steps and _is_flat(steps[-1])):
        return ""
    flat = "".join("x" if _is_flat(line) else "." for line in steps if "reward" in line)
    if not flat.endswith("x" * FLAT_STEPS) or "x" * FLAT_STEPS in flat[:-1]:
        return ""
    last = steps[-1]
    if last["frac_reward_zero_std"] == 1:
        found = f"all completions of a question earned the same (mean reward {last['reward']:.2f}): nothing was learned"
    else:
        found = "no completion had the form of an answer: no right answer was paid"
    wrong = rules_line(_what_is_wrong(rollout, row, answer_format) for row in range(len(rollout.texts)))
    return (
        f"Warning: for {FLAT_STEPS} steps {found}.\n"
        f"The last {len(rollout.texts)} completions: {wrong}.\n"
        "What to do: docs/not_learning.md, 'The reward stays flat'."
    )


def _is_flat(line: Mapping[str, Any]) -> bool:
    ill_formed = line.get("well_formed") == 0 and "rewards/correctness/mean" in line
    return line.get("frac_reward_zero_std") == 1 or ill_formed


def _what_is_wrong(rollout: Rollout, row: int, answer_format: AnswerFormat) -> str:
    text, question = rollout.texts[row], rollout.questions[row // rollout.group_size]
    if rule := broken_rule(text, answer_format, cut=not rollout.completions.ended[row]):
        return rule
    if answer_format.kind == "none":
        return f"reward {rollout.rewards.total[row]:.2f}"
    right = is_right(answer_format.parse(text).answer, question, answer_format)
    return "right" if right else "well-formed, but wrong"
