"""Texts on the page: held-out answers before and after training side by side, and completions sampled in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ds.report.run_files import JsonObject, RunFiles, as_label, as_number, as_object, as_objects, as_text

MOST_PAIRS = 30
MOST_OF_A_KIND = 10  # so that gained and lost ones are both shown
MOST_SAMPLES = 4  # per step


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, if it is right, and its rewards."""

    text: str
    right: bool | None  # None: the file does not say
    verdict: str  # right, or what is wrong; the rule of the form that it breaks, if nothing more is known
    rewards: list[tuple[str, str]]  # name, value; the sum first


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out question and its answers."""

    question: str
    context: str  # "" if the question has none, or of an older version
    label: str
    before: Answer
    after: Answer | None

    @property
    def change(self) -> str:
        if self.after is None or self.after.right is None or self.before.right == self.after.right:
            return ""
        return "gained" if self.after.right else "lost"


@dataclass(frozen=True, slots=True)
class SampledStep:
    """Some completions of one step, and their total number."""

    step: int
    count: int
    shown: list[tuple[str, str, Answer]]  # question, label, completion


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs on the page, and the numbers of all, gained and lost pairs."""

    shown: list[Pair]
    count: int
    gained: int
    lost: int


def pairs(run: RunFiles) -> Pairs | None:
    """Choose pairs for the page: first some that changed, gained and lost, then others in their order."""
    every = [_pair(row) for row in as_objects(run.held_out.get("questions", []))]
    gained, lost = ([pair for pair in every if pair.change == change] for change in ("gained", "lost"))
    first = [*gained[:MOST_OF_A_KIND], *lost[:MOST_OF_A_KIND]]
    chosen = {id(pair) for pair in first}
    shown = [*first, *(pair for pair in every if id(pair) not in chosen)][:MOST_PAIRS]
    return Pairs(shown, len(every), len(gained), len(lost)) if every else None


def sampled_steps(run: RunFiles) -> list[SampledStep]:
    return [_sampled_step(step, rows) for step, rows in run.completions.items()]


def _pair(row: JsonObject) -> Pair:
    question, label = as_text(row["question"]), as_label(row["label"])
    after = _held_out(as_object(row["after"]), row["label"]) if "after" in row else None
    before = _held_out(as_object(row["before"]), row["label"])
    return Pair(question, as_text(row.get("context", "")), label, before, after)


def _held_out(row: JsonObject, label: str) -> Answer:
    answer = row["answer"]
    right = row.get("right", answer == label) if label else None  # an older version did not write it
    broken = as_label(row.get("broken_rule", ""))
    wrong = f"wrong: {as_label(answer)}"
    if answer is None:
        wrong = f"wrong: no answer in the required form{f' ({broken})' if broken else ''}"
    by_name = as_object(row.get("rewards", {}))
    rewards = _shown_rewards(row.get("reward"), by_name) if "reward" in row else []
    if (p := as_number(as_object(row.get("p", {})).get(label))) is not None:
        rewards.append(("p(right)", f"{p:.2f}"))
    return Answer(as_text(row["text"]), right, broken if right is None else "right" if right else wrong, rewards)


def _sampled_step(step: int, rows: Sequence[JsonObject]) -> SampledStep:
    return SampledStep(step, len(rows), [_sample(row) for row in rows[:MOST_SAMPLES]])


def _sample(row: JsonObject) -> tuple[str, str, Answer]:
    by_name = {key.removeprefix("rewards/"): value for key, value in row.items() if key.startswith("rewards/")}
    rewards = _shown_rewards(row.get("reward"), by_name)
    if (advantage := as_number(row.get("advantage"))) is not None:
        rewards.append(("advantage", f"{advantage:+.2f}"))
    answer = Answer(as_text(row["completion"]), None, as_label(row.get("broken_rule", "")), rewards)
    return as_text(row["question"]), as_label(row["label"]), answer


def _shown_rewards(total: object, by_name: JsonObject) -> list[tuple[str, str]]:
    return [(as_label(name), _shown_number(value)) for name, value in {"reward": total, **by_name}.items()]


def _shown_number(value: object) -> str:
    number = as_number(value)
    return "none" if number is None else f"{number:.2f}"
