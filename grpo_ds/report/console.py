"""What a person reads of a run: rank 0 alone speaks, in plain lines when not at a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo_ds.memory.phases import Profiler
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.report.held_out import right
from grpo_ds.report.live import LOSS_NOTE, PHASES, History, LiveView, clock, memory_line
from grpo_ds.report.memory import Comparison, compare, diagnosis
from grpo_ds.report.plan import PLACES, phases
from grpo_ds.task.grading import Evaluation, Grades, mcnemar
from grpo_ds.task.questions import Question
from grpo_ds.terminal import escape_control_chars

SAMPLES = 4
STALE_NOTE = (
    "Freed memory is kept for the next step, so a phase shows what larger ones before it have left; "
    "launch/profile_memory.py measures each alone."
)


class Console:
    """Lines, progress bars and the tables of a run."""

    def __init__(self, *, speaks: bool = True) -> None:
        self._rich = RichConsole(quiet=not speaks, highlight=False, soft_wrap=True)
        self._is_live = speaks and self._rich.is_terminal  # a live view of a silent rank would swallow its warnings
        self._view: LiveView | None = None

    def line(self, text: str) -> None:
        """A Text and not a str: [red] in a model's name or answer is no markup."""
        self._rich.print(Text(escape_control_chars(text)))

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with time left at a terminal, nothing otherwise; yields `advance(by)`."""
        if self._view:  # two live displays would draw over each other
            bars, task = self._view.bars, self._view.bars.add_task(what, total=total, left="")
            try:
                yield lambda by: bars.advance(task, by)
            finally:
                bars.remove_task(task)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, *left, console=self._rich, transient=True, disable=not self._is_live) as bar:
            task = bar.add_task(what, total=total)
            yield lambda by: bar.advance(task, by)

    @contextmanager
    def training(self, total: int, history: History, doing: Callable[[], str]) -> Iterator[None]:
        """The live view at a terminal, which stays as it last was; a line a step otherwise."""
        self.line(LOSS_NOTE)
        if not self._is_live:
            yield
            return
        self._view = LiveView(total, history, doing)
        try:
            with Live(self._view, console=self._rich, refresh_per_second=1):
                yield
        finally:
            self._view = None

    def step(self, metrics: dict[str, float], *, step: int, total: int, seconds_left: float) -> None:
        """One line a step, or none at a terminal: rewards first, loss last."""
        if self._view:
            return self._view.advance_to(step, seconds_left)
        rewards = " ".join(
            f"{name.removeprefix('rewards/')} {value:.2f}"
            for name, value in metrics.items()
            if name.startswith("rewards/")
        )
        # A step resumed between its updates was sampled by the run before.
        seconds = " ".join(f"{phase} {metrics.get(f'seconds/{phase}', 0):.1f}" for phase in PHASES)
        floor = f" (floor {metrics['kl_floor']:.4f})" if metrics.get("kl_floor") else ""
        self.line(
            f"step {step:>{len(str(total))}}/{total}  reward {metrics['reward']:.2f} ({rewards})  "
            f"right {metrics['accuracy']:.0%}  kl {metrics['kl']:.4f}{floor}  "
            f"length {metrics['completion_length']:.0f}  {metrics['tokens_per_second']:.0f} tok/s  {seconds} s  "
            f"{memory_line(metrics)}  loss {metrics['loss']:+.4f}  left {clock(seconds_left)}"
        )

    def plan(self, plan: Plan, gpu_gib: float | None, ram_gib: float) -> None:
        """What each phase will take, a row a memory."""
        self._rich.print(phases(plan, gpu_gib, ram_gib))

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """The first completions, scored, before any update."""
        self.line(f"The first {min(len(rows), SAMPLES)} completions, before any update:")
        for row in rows[:SAMPLES]:
            earned = " ".join(
                f"{name.removeprefix('rewards/')} {value:.2f}"
                for name, value in row.items()
                if name.startswith("rewards/") and value is not None
            )
            self.line(f"  {row['question']} ({row['label']})\n    {' '.join(row['completion'].split())}")
            self.line(f"    reward {row['reward']:.2f} ({earned})")

    def memory(self, profiler: Profiler) -> None:
        """Each phase's peak beside its plan, on the card and on the host, and what binds."""
        uses = list(profiler.uses().values())
        places: list[Where] = ["gpu", "host"] if any(use.gpu_peak for use in uses) else ["host"]
        table = Table(title="Memory by phase, GiB at the peak", title_justify="left")
        table.add_column("")
        table.add_column("seconds", justify="right")
        for where in places:
            for column in ("", " planned", " off by"):
                table.add_column(f"{PLACES[where]}{column}", justify="right")
        compared = {where: compare(uses, profiler.plan, where) for where in places}
        for i, use in enumerate(uses):
            cells = [cell for where in places for cell in _memory_cells(compared[where][i])]
            table.add_row(use.phase, f"{use.seconds:.1f}", *cells)
        self._rich.print(table)
        if "gpu" in places:
            reserved, pinned = max(use.gpu_reserved for use in uses), max(use.pinned for use in uses)
            self.line(f"torch held {reserved / GIB:.2f} GiB of the card and {pinned / GIB:.2f} GiB of pinned memory.")
        for where in places:
            self.line(diagnosis(compared[where], profiler.plan, where))
        if not profiler.exact and "gpu" not in places:
            self.line(STALE_NOTE)

    def before_and_after(self, before: Evaluation, after: Evaluation, questions: Sequence[Question]) -> None:
        """The held-out questions before and after training, with what chance and a constant answer would give."""
        table = Table(title=f"Held-out questions ({before.grades.count}, greedy)", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for name, show in _rows(before.grades):
            table.add_row(Text(escape_control_chars(name)), show(before.grades), show(after.grades))
        self._rich.print(table)
        self.line(
            f"Always answering the commonest label scores {before.grades.majority_baseline:.1%}.  "
            f"McNemar p = {mcnemar(right(before, questions), right(after, questions)):.3f}"
        )
        if after.grades.collapsed:
            self.line("Warning: nearly all answers are one class; accuracy then says little (see macro-F1).")


def _memory_cells(row: Comparison) -> list[str]:
    planned = "" if row.planned is None else f"{row.planned / GIB:.2f}"
    return [f"{row.measured / GIB:.2f}", planned, "" if row.difference is None else f"{row.difference:+.1%}"]


def _rows(grades: Grades) -> list[tuple[str, Callable[[Grades], str]]]:
    recalls = [(f"recall {label}", lambda g, label=label: f"{g.recall[label]:.1%}") for label in grades.recall]
    return [
        ("accuracy", lambda g: f"{g.accuracy:.1%}"),
        ("  95 % interval", lambda g: "{:.1%} to {:.1%}".format(*g.accuracy_interval)),
        ("macro-F1", lambda g: f"{g.macro_f1:.3f}"),
        *recalls,
        ("well-formed", lambda g: f"{g.well_formed:.1%}"),
    ]
