"""What is seen of a run at a terminal while it goes on: one panel, drawn anew every second from the run's history.

Rewards stand first and the loss last: it is near 0 whatever happens (LOSS_NOTE).
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from grpo_ds.terminal import escape_control_chars

PHASES = ("sample", "reference", "update", "step")  # of a training step
LOSS_NOTE = (
    "The loss starts near 0 whatever happens: the advantages of a group sum to 0, and the ratio of a first update is 1."
)
RECENT, TREND = 10, 40  # steps of the mean, and of the little chart beside it
BARS = "▁▂▃▄▅▆▇█"
History = Sequence[dict[str, Any]]


class LiveView:
    """A renderable; history: a line a step as in metrics.jsonl, growing. doing: the phase that is open."""

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
    """The last step, the mean of the last ones, and how it came."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (("", "left"), ("now", "right"), (f"mean of {RECENT}", "right"), ("", "left"), ("", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, shown, series in _series(steps):
        recent = [value for value in series[-RECENT:] if value is not None]
        mean = shown.format(fmean(recent)) if recent else ""
        note = "near 0 at first, whatever happens" if name == "loss" else ""
        table.add_row(
            Text(escape_control_chars(name)), _show(shown, series[-1]), mean, sparkline(series[-TREND:]), note
        )
    seconds = "  ".join(f"{phase} {steps[-1].get(f'seconds/{phase}') or 0:.1f}" for phase in PHASES)
    table.caption, table.caption_justify = Text(f"seconds: {seconds}    {memory_line(steps[-1])}"), "left"
    return table


def _series(steps: History) -> list[tuple[str, str, list[float | None]]]:
    """(name, format, a value a step), rewards first and the loss last."""
    named = [name for name in steps[-1] if name.startswith("rewards/")]
    rows = [("reward", "{:.2f}", [line["reward"] for line in steps])]
    rows += [(f"  {name.removeprefix('rewards/')}", "{:.2f}", [line.get(name) for line in steps]) for name in named]
    rows.append(("accuracy", "{:.0%}", [line.get("accuracy") for line in steps]))
    if "kl_floor" in steps[-1]:
        rows.append(("KL above its floor", "{:.4f}", [above_floor(line) for line in steps]))
    rows.append(("length", "{:.0f}", [line.get("completion_length") for line in steps]))
    rows.append(("tokens/s", "{:.0f}", [line.get("tokens_per_second") for line in steps]))
    rows.append(("loss", "{:+.4f}", [line.get("loss") for line in steps]))
    return rows


def above_floor(line: dict[str, Any]) -> float | None:
    """The KL less what an 8-bit reference shows of an unchanged policy."""
    kl, floor = line.get("kl"), line.get("kl_floor")
    return None if kl is None or floor is None else kl - floor


def memory_line(line: dict[str, Any]) -> str:
    gpu = line.get("memory/gpu_peak_gib")
    return f"RAM {line['memory/ram_gib']:.1f}G" + (f" GPU {gpu:.1f}G" if gpu is not None else "")


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value, the lowest ▁ and the highest █; a gap where there is none."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BARS[round((value - low) * scale)] for value in values)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _show(shown: str, value: float | None) -> str:
    return "-" if value is None else shown.format(value)
