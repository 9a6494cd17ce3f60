"""The live view of a run at a terminal: one panel, drawn every second from the run's history.

Rewards come first. The loss comes last, because it starts near 0 in every run (LOSS_NOTE).
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from grpo_ds.report.metric_names import MEAN_LENGTH, reward_name
from grpo_ds.terminal import escape_control_chars

PHASES = ("sample", "reference", "update", "step")  # of a training step
LOSS_NOTE = (
    "The loss starts near 0 in every run: the advantages of a group sum to 0, and the ratio of the first update is 1."
)
RECENT, TREND = 10, 40  # number of steps in the mean and in the small chart
BARS = "▁▂▃▄▅▆▇█"
History = Sequence[dict[str, Any]]


class LiveView:
    """A renderable. history: a line per step as in metrics.jsonl, growing. doing: returns the work in progress."""

    def __init__(self, total: int, history: History, doing: Callable[[], str]) -> None:
        self.history, self.doing = history, doing
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, TextColumn("{task.fields[left]}"), auto_refresh=False)
        self.training = self.bars.add_task("Training", total=total, left="")

    def advance_to(self, step: int, seconds_left: float) -> None:
        self.bars.update(self.training, completed=step, left=f"left {clock(seconds_left)}")

    def __rich__(self) -> Group:
        steps = [line for line in self.history if "reward" in line]
        if not steps:
            return Group(self.bars, Text(f"first step: {self.doing()}", style="dim"))
        return Group(self.bars, metrics_table(steps), Text(f"now: {self.doing()}", style="dim"))


def metrics_table(steps: History) -> Table:
    """Table of the last step, the mean of the last steps and the trend."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (("", "left"), ("now", "right"), (f"mean of {RECENT}", "right"), ("", "left"), ("", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, shown, series in _series(steps):
        recent = [value for value in series[-RECENT:] if value is not None]
        mean = shown.format(fmean(recent)) if recent else ""
        note = "starts near 0 in every run" if name == "loss" else ""
        table.add_row(
            Text(escape_control_chars(name)), _show(shown, series[-1]), mean, sparkline(series[-TREND:]), note
        )
    seconds = "  ".join(f"{phase} {steps[-1].get(f'seconds/{phase}') or 0:.1f}" for phase in PHASES)
    table.caption, table.caption_justify = Text(f"seconds: {seconds}    {memory_line(steps[-1])}"), "left"
    return table


def _series(steps: History) -> list[tuple[str, str, list[float | None]]]:
    """Return (name, format, a value per step), rewards first and the loss last."""
    rows = [("reward", "{:.2f}", [line["reward"] for line in steps])]
    for metric in steps[-1]:
        if name := reward_name(metric):
            rows.append((f"  {name}", "{:.2f}", [line.get(metric) for line in steps]))
    if "accuracy" in steps[-1]:
        rows.append(("accuracy", "{:.0%}", [line.get("accuracy") for line in steps]))
    if "kl_floor" in steps[-1]:
        rows.append(("KL above its floor", "{:.4f}", [above_floor(line) for line in steps]))
    rows.append(("length", "{:.0f}", [line.get(MEAN_LENGTH) for line in steps]))
    rows.append(("tokens/s", "{:.0f}", [line.get("tokens_per_second") for line in steps]))
    rows.append(("loss", "{:+.4f}", [line.get("loss") for line in steps]))
    return rows


def above_floor(line: dict[str, Any]) -> float | None:
    """KL minus the floor that an 8-bit reference has for an unchanged policy."""
    kl, floor = line.get("kl"), line.get("kl_floor")
    return None if kl is None or floor is None else kl - floor


def memory_line(line: dict[str, Any]) -> str:
    gpu = line.get("memory/gpu_peak_gib")
    return f"RAM {line['memory/ram_gib']:.1f}G" + (f" GPU {gpu:.1f}G" if gpu is not None else "")


def sparkline(values: Sequence[float | None]) -> str:
    """Return one character per value, from ▁ for the lowest to █ for the highest; a gap for None."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BARS[round((value - low) * scale)] for value in values)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _show(shown: str, value: float | None) -> str:
    return "-" if value is None else shown.format(value)
