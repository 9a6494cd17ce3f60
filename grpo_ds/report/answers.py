"""Texts side by side on the page: the held-out questions before and after, and what was sampled in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ds.report.run_files import JsonObject, RunFiles, mapping, name, number, rows, text

MOST_PAIRS = 30
MOST_OF_A_KIND = 10  # gained and lost are both to be seen
MOST_SAMPLES = 4  # of a step


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote, whether it is right, what it earned."""

    text: str
    right: bool | None  # None: the file does not say
    verdict: str
    rewards: list[tuple[str, str]]  # name, value; the sum first


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out question and its answers."""

    question: str
    label: str
    before: Answer
    after: Answer | None

    @property
    def change(self) -> str:
        if self.after is None or self.before.right == self.after.right:
            return ""
        return "gained" if self.after.right else "lost"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A few of the completions of one step."""

    step: int
    count: int
    shown: list[tuple[str, str, Answer]]  # question, label, completion


@dataclass(frozen=True, slots=True)
class Pairs:
    """Those that are shown, and how many there are of each kind."""

    shown: list[Pair]
    count: int
    gained: int
    lost: int


def pairs(run: RunFiles) -> Pairs | None:
    """First some that changed, gained and lost, then others in their order."""
    every = [_pair(row) for row in rows(run.held_out.get("questions", []))]
    gained, lost = ([pair for pair in every if pair.change == change] for change in ("gained", "lost"))
    first = [*gained[:MOST_OF_A_KIND], *lost[:MOST_OF_A_KIND]]
    seen = {id(pair) for pair in first}
    shown = [*first, *(pair for pair in every if id(pair) not in seen)][:MOST_PAIRS]
    return Pairs(shown, len(every), len(gained), len(lost)) if every else None


def samples(run: RunFiles) -> list[Sampled]:
    return [_sampled(step, found) for step, found in run.completions.items()]


def _pair(row: JsonObject) -> Pair:
    after = _held_out(mapping(row["after"]), row["label"]) if "after" in row else None
    return Pair(text(row["question"]), name(row["label"]), _held_out(mapping(row["before"]), row["label"]), after)


def _held_out(row: JsonObject, label: str) -> Answer:
    right, answer = row["answer"] == label, row["answer"]
    verdict = "right" if right else "wrong: no answer in the asked form" if answer is None else f"wrong: {name(answer)}"
    by_name = mapping(row.get("rewards", {}))
    return Answer(text(row["text"]), right, verdict, _earned(row.get("reward"), by_name) if "reward" in row else [])


def _sampled(step: int, found: Sequence[JsonObject]) -> Sampled:
    return Sampled(step, len(found), [_sample(row) for row in found[:MOST_SAMPLES]])


def _sample(row: JsonObject) -> tuple[str, str, Answer]:
    by_name = {key.removeprefix("rewards/"): value for key, value in row.items() if key.startswith("rewards/")}
    earned = _earned(row.get("reward"), by_name)
    if (advantage := number(row.get("advantage"))) is not None:
        earned.append(("advantage", f"{advantage:+.2f}"))
    return text(row["question"]), name(row["label"]), Answer(text(row["completion"]), None, "", earned)


def _earned(total: object, by_name: JsonObject) -> list[tuple[str, str]]:
    return [(name(reward), _value(value)) for reward, value in {"reward": total, **by_name}.items()]


def _value(value: object) -> str:
    found = number(value)
    return "none" if found is None else f"{found:.2f}"
