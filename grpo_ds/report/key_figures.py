"""Key figures of a run for the top of its page: its state, tiles, and the table of grades. verdict.py judges them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_ds.memory.plan import MEMORY_NAMES
from grpo_ds.report.figures import confidence_rows, reward_rows
from grpo_ds.report.memory_page import kinds, peak_gib
from grpo_ds.report.run_files import JsonObject, RunFiles, as_label, as_number, as_object, as_text
from grpo_ds.run_folder.status import CHANGED_INPUTS

MAJORITY = "majority baseline (always the most common label)"
LOGGED = {"mean_reward": "reward"}  # a figure -> its name in metrics.jsonl, if that is another
RUNNING = {"training": "training", "evaluating": "evaluating"}  # state -> its words
ENDED_EARLY = {"stopped": "Stopped", "failed": "Failed"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure and a figure to compare it with."""

    name: str
    value: str
    beside: str = ""


def about(run: RunFiles) -> list[tuple[str, str]]:
    """Return what was trained, on what: name and value, those that are known; of a path its last part."""
    counts, held_out = as_object(run.summary.get("questions", {})), as_object(run.held_out.get("before", {}))
    parts = {"to train on": counts.get("train"), "held out": counts.get("held_out", held_out.get("count"))}
    split = ", ".join(f"{count:.0f} {use}" for use, value in parts.items() if (count := as_number(value)) is not None)
    model, data = (Path(as_text(run.config[it])).name if run.config.get(it) else "" for it in ("model", "data"))
    rank = as_number(run.config.get("lora_r"))
    adapter = f", a LoRA adapter of rank {rank:.0f}" if rank else ""
    shown = {"Model": model and f"{model}{adapter}", "Data": ": ".join(filter(None, (data, split)))}
    return [(name, value) for name, value in shown.items() if value]


def state(run: RunFiles) -> str:
    """Say how far an unfinished run is; "" for a finished run."""
    status = {fact: as_label(value) for fact, value in run.status.items()}
    if not status:
        return f"The state of this run is unknown ({len(run.steps)} steps are logged)."
    now, step = status.get("state", ""), f"step {status.get('step', 0)} of {status.get('max_steps', '?')}"
    if now == "done":
        return ""
    if now in ENDED_EARLY:
        reason = status.get("message", "").strip().partition("\n")[0].rstrip(".")
        further = f" Resume with: {as_text(run.status['resume'])}" if "resume" in status else ""
        code = f"{ENDED_EARLY[now]} at {step} with exit code {status.get('exit_code', '?')}"
        return f"{code}{f': {reason}' if reason else ''}.{further}"
    when = status.get("time", "time unknown").replace("T", " ")
    return f"This run has not ended: it was {RUNNING.get(now, now)} at {step} when it last reported, {when}."


def changed(run: RunFiles) -> str:
    """Return a warning if the run was resumed with changed inputs, else ""."""
    changes = run.status.get(CHANGED_INPUTS, [])
    if not isinstance(changes, list) or not changes:
        return ""
    return f"The run was resumed although its inputs had changed: {'; '.join(map(as_text, changes))}."


def tiles(run: RunFiles) -> list[Tile]:
    """Return a tile for everything that was measured."""
    return [*_grade_tiles(run), *_step_tiles(run), *_memory_tiles(run)]


def grades_table(run: RunFiles) -> list[tuple[str, list[str]]]:
    """Return a row for each grade of the held-out answers: its name, and the values before and after."""
    both = [as_object(run.held_out[when]) for when in ("before", "after") if when in run.held_out]
    if not both:
        return []
    first = both[0]
    shown: list[tuple[str, Callable[[JsonObject], str]]] = []
    if "accuracy" in first:
        shown.append(("Accuracy", lambda g: percent(g["accuracy"])))
        shown.append(("95% interval", lambda g: " to ".join(percent(bound) for bound in g["accuracy_interval"])))
    if "macro_f1" in first:
        shown.append(("Macro-F1", lambda g: f"{g['macro_f1']:.3f}"))
    shown += [(f"Recall of {label}", _recall(label)) for label in first.get("recall", ())]
    if "well_formed" in first:
        shown.append(("Well-formed", lambda g: percent(g["well_formed"])))
    if "predicted" in first:
        given = lambda g: ", ".join(f"{label} {count}" for label, count in g["predicted"].items())  # noqa: E731
        shown.append(("Answers given", given))
        shown.append((MAJORITY.capitalize(), lambda g: percent(g["majority_baseline"])))
    shown += [
        (name.strip()[0].upper() + name.strip()[1:], show)
        for name, show in [*confidence_rows(both), *reward_rows(both)]
    ]
    return [(as_label(title), [as_text(show(grades)) for grades in both]) for title, show in shown]


def _recall(label: str) -> Callable[[JsonObject], str]:
    return lambda grades: percent(grades["recall"][label])


def quarters(run: RunFiles) -> tuple[float, float] | None:
    """Mean reward of the first and of the last quarter of the steps."""
    rewards = [value for row in run.steps if (value := as_number(row.get("reward"))) is not None]
    size = max(1, len(rewards) // 4)
    return (sum(rewards[:size]) / size, sum(rewards[-size:]) / size) if rewards else None


def percent(share: float) -> str:
    return f"{share:.1%}"


def _grade_tiles(run: RunFiles) -> list[Tile]:
    before, after = as_object(run.held_out.get("before", {})), as_object(run.held_out.get("after", {}))
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "accuracy": ("Accuracy", percent),
        "mean_p_right": ("Mean p(right)", lambda value: f"{value:.3f}"),
        "macro_f1": ("Macro-F1", lambda value: f"{value:.3f}"),
        "well_formed": ("Well-formed", percent),
        "mean_reward": ("Mean reward, held out", lambda value: f"{value:.3f}"),
    }
    if not before:
        return []
    shown = {
        key: how for key, how in shown.items() if as_number((after or before).get(key)) is not None and key in before
    }
    if not after:
        return [_latest(run, title, show, key, before[key]) for key, (title, show) in shown.items()]
    return [Tile(title, show(after[key]), f"before: {show(before[key])}") for key, (title, show) in shown.items()]


def _latest(run: RunFiles, title: str, show: Callable[[float], str], key: str, before: float) -> Tile:
    """Return the tile of the latest evaluation during training."""
    for row in reversed(run.evaluations):
        if (value := as_number(row.get(f"eval/{LOGGED.get(key, key)}"))) is not None:
            return Tile(title, show(value), f"after step {row['step']:.0f}; before: {show(before)}")
    return Tile(title, show(before), "before training")


def _step_tiles(run: RunFiles) -> list[Tile]:
    if not run.steps:
        return []
    made, last, rewards = [], run.steps[-1], quarters(run)
    if rewards:
        made.append(Tile("Reward, last quarter", f"{rewards[1]:.2f}", f"first quarter: {rewards[0]:.2f}"))
    if kl := as_number(last.get("kl")):
        floor = as_number(last.get("kl_floor"))
        made.append(Tile("KL per token, last step", f"{kl:.4f}", f"floor: {floor:.4f}" if floor is not None else ""))
    planned = run.status.get("max_steps")
    made.append(Tile("Steps", f"{last['step']:.0f}", f"of {as_label(planned)}" if planned is not None else ""))
    times = [
        sum(as_number(value) or 0.0 for metric, value in row.items() if metric.startswith("seconds/"))
        for row in run.steps
    ]
    if any(times):
        made.append(Tile("Time in steps", duration(sum(times)), f"{sum(times) / len(times):.1f} s per step"))
    return made


def _memory_tiles(run: RunFiles) -> list[Tile]:
    if run.memory:
        peaks = {MEMORY_NAMES[kind]: peak_gib(run.memory, kind) for kind in kinds(run.memory)}
        return [Tile(f"Peak of {name}", f"{peak:.1f} GiB") for name, peak in peaks.items()]
    last = run.steps[-1] if run.steps else {}
    metrics = {"memory/ram_gib": MEMORY_NAMES["ram"], "memory/gpu_peak_gib": MEMORY_NAMES["gpu"]}
    sizes = {name: as_number(last.get(metric)) for metric, name in metrics.items()}
    return [Tile(f"Peak of {name}", f"{size:.1f} GiB", "so far") for name, size in sizes.items() if size]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
