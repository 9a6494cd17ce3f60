"""What a run came to, in words and in a few figures: the first things on its page."""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_ds.report.memory_use import PLACES, peak, places
from grpo_ds.report.run_files import JsonObject, RunFiles, mapping, name, number, text

SIGNIFICANT = 0.05
UNDER_WAY = {"training": "in training", "evaluating": "evaluating"}
OVER = {"stopped": "Stopped", "failed": "Failed"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure with what to compare it with."""

    name: str
    value: str
    beside: str = ""


def state(run: RunFiles) -> str:
    """Where the run stands, when that is not at its end; "" for one that is done."""
    status = {fact: name(value) for fact, value in run.status.items()}
    if not status:
        return f"Where this run stands is not known ({len(run.steps)} steps are logged)."
    now, where = status.get("state", ""), f"step {status.get('step', 0)} of {status.get('max_steps', '?')}"
    if now == "done":
        return ""
    if now in OVER:
        reason = status.get("message", "").strip().partition("\n")[0].rstrip(".")
        further = f" Go on with: {text(run.status['resume'])}" if "resume" in status else ""
        code = f"{OVER[now]} at {where} with exit code {status.get('exit_code', '?')}"
        return f"{code}{f': {reason}' if reason else ''}.{further}"
    when = status.get("time", "time unknown").replace("T", " ")
    return f"This run has not ended: {UNDER_WAY.get(now, now)} at {where} when it last wrote, {when}."


def verdict(run: RunFiles) -> str:
    """Whether training helped, by how much and against what."""
    before, after = mapping(run.held_out.get("before", {})), mapping(run.held_out.get("after", {}))
    if after:
        return f"{_change('Well-formed answers', before, after, 'well_formed')}. {_accuracy(run, before, after)}"
    rewards = quarters(run)
    reward = " The mean reward was {:.2f} in the first quarter of the steps and {:.2f} in the last."
    reward = reward.format(*rewards) if rewards else ""
    if before:
        constant = f"always giving the commonest label: {percent(before['majority_baseline'])}"
        right = f"{percent(before['accuracy'])} of {before['count']} held-out questions were answered right"
        return f"Before training, {right} ({constant}); the answers after training are still to come.{reward}"
    return f"No held-out answers were compared.{reward}"


def collapsed(run: RunFiles) -> str:
    """A warning where nearly all answers are one class, else ""."""
    after = mapping(run.held_out.get("after", {}))
    if not after.get("collapsed"):
        return ""
    predicted = {label: number(count) or 0 for label, count in mapping(after["predicted"]).items()}
    label, most = max(predicted.items(), key=lambda pair: pair[1])
    return (
        f"Nearly all answers are one class: “{name(label)}” {most:.0f} times of {sum(predicted.values()):.0f}. "
        "Accuracy then says little; see macro-F1 and the recalls."
    )


def tiles(run: RunFiles) -> list[Tile]:
    """Of what was measured."""
    return [*_grade_tiles(run), *_step_tiles(run), *_memory_tiles(run)]


def grades_table(run: RunFiles) -> list[tuple[str, list[str]]]:
    """The grades of the held-out answers, a row each, before and after."""
    both = [mapping(run.held_out[when]) for when in ("before", "after") if when in run.held_out]
    if not both:
        return []
    shown: list[tuple[str, Callable[[JsonObject], str]]] = [
        ("Accuracy", lambda g: percent(g["accuracy"])),
        ("95% interval", lambda g: " to ".join(percent(bound) for bound in g["accuracy_interval"])),
        ("Macro-F1", lambda g: f"{g['macro_f1']:.3f}"),
        *[(f"Recall of {label}", lambda g, label=label: percent(g["recall"][label])) for label in both[0]["recall"]],
        ("Well-formed", lambda g: percent(g["well_formed"])),
        ("Answers given", lambda g: ", ".join(f"{label} {count}" for label, count in g["predicted"].items())),
        ("Always the commonest label", lambda g: percent(g["majority_baseline"])),
    ]
    return [(name(title), [text(show(grades)) for grades in both]) for title, show in shown]


def quarters(run: RunFiles) -> tuple[float, float] | None:
    """Mean reward of the first and of the last quarter of the steps."""
    rewards = [value for row in run.steps if (value := number(row.get("reward"))) is not None]
    size = max(1, len(rewards) // 4)
    return (sum(rewards[:size]) / size, sum(rewards[-size:]) / size) if rewards else None


def percent(share: float) -> str:
    return f"{share:.1%}"


def _accuracy(run: RunFiles, before: JsonObject, after: JsonObject) -> str:
    low, high = after["accuracy_interval"]
    baseline, p = after["majority_baseline"], run.held_out.get("mcnemar")
    sure = f"95% interval {percent(low)} to {percent(high)}"
    chance = ""
    if (p := number(p)) is not None:
        shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        chance = f"; McNemar {shown}: {'more than' if p < SIGNIFICANT else 'a change that could be'} chance"
    beside = "above" if low > baseline else "below" if high < baseline else "not told apart from"
    constant = f"{beside} the {percent(baseline)} of always giving the commonest label"
    change, count = _change("Accuracy", before, after, "accuracy"), after["count"]
    return f"{change} of {count} held-out questions ({sure}{chance}), {constant}."


def _change(what: str, before: JsonObject, after: JsonObject, grade: str) -> str:
    first, last = before[grade], after[grade]
    if first == last:
        return f"{what} stayed at {percent(last)}"
    return f"{what} {'rose' if last > first else 'fell'} from {percent(first)} to {percent(last)}"


def _grade_tiles(run: RunFiles) -> list[Tile]:
    before, after = mapping(run.held_out.get("before", {})), mapping(run.held_out.get("after", {}))
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "accuracy": ("Accuracy", percent),
        "macro_f1": ("Macro-F1", lambda value: f"{value:.3f}"),
        "well_formed": ("Well-formed", percent),
    }
    if not before:
        return []
    if not after:
        return [_so_far(run, title, show, key, before[key]) for key, (title, show) in shown.items()]
    return [Tile(title, show(after[key]), f"before: {show(before[key])}") for key, (title, show) in shown.items()]


def _so_far(run: RunFiles, title: str, show: Callable[[float], str], key: str, before: float) -> Tile:
    """As last evaluated on the way."""
    for row in reversed(run.evaluations):
        if (value := number(row.get(f"eval/{key}"))) is not None:
            return Tile(title, show(value), f"after step {row['step']:.0f}; before: {show(before)}")
    return Tile(title, show(before), "before training")


def _step_tiles(run: RunFiles) -> list[Tile]:
    if not run.steps:
        return []
    made, last, rewards = [], run.steps[-1], quarters(run)
    if rewards:
        made.append(Tile("Reward, last quarter", f"{rewards[1]:.2f}", f"first quarter: {rewards[0]:.2f}"))
    if kl := number(last.get("kl")):
        floor = number(last.get("kl_floor"))
        made.append(Tile("KL a token, last step", f"{kl:.3f}", f"floor: {floor:.3f}" if floor is not None else ""))
    planned = run.status.get("max_steps")
    made.append(Tile("Steps", f"{last['step']:.0f}", f"of {name(planned)}" if planned is not None else ""))
    took = [
        sum(number(value) or 0.0 for metric, value in row.items() if metric.startswith("seconds/")) for row in run.steps
    ]
    if any(took):
        made.append(Tile("Time in steps", duration(sum(took)), f"{sum(took) / len(took):.1f} s a step"))
    return made


def _memory_tiles(run: RunFiles) -> list[Tile]:
    if run.memory:
        return [Tile(f"Peak of {PLACES[where]}", f"{peak(run.memory, where):.1f} GiB") for where in places(run.memory)]
    last = run.steps[-1] if run.steps else {}
    named = {"memory/ram_gib": "Peak of RAM", "memory/gpu_peak_gib": "Peak of card"}
    return [Tile(title, f"{size:.1f} GiB", "so far") for key, title in named.items() if (size := number(last.get(key)))]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
