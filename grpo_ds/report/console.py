"""Console output of a run, only from rank 0: a live view at a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo_ds.memory.phases import Profiler
from grpo_ds.memory.plan import GIB, MEMORY_NAMES, MemoryKind, Plan
from grpo_ds.report.figures import change_lines, confidence_rows, grade_line, grade_rows, reward_rows
from grpo_ds.report.held_out import paired_tests
from grpo_ds.report.live import LOSS_NOTE, PHASES, History, LiveView, clock, memory_line
from grpo_ds.report.long_work import Advance, ProgressLines, Work
from grpo_ds.report.memory_measured import Comparison, compare, diagnosis
from grpo_ds.report.memory_plan import phase_table
from grpo_ds.report.metric_names import MEAN_LENGTH, reward_name
from grpo_ds.system.invocation import command
from grpo_ds.task.broken_rules import rules_line
from grpo_ds.task.grading import Evaluation
from grpo_ds.task.questions import Question
from grpo_ds.terminal import escape_control_chars

SAMPLES = 4
SHOWN_ENDS = 700, 500  # characters of a prompt: instructions and beginning, question and end
STALE_NOTE = (
    "Freed memory is kept for the next step, so the peak of a phase may include memory of a larger phase before it; "
    "{} measures each phase alone."
)


class Console:
    """Lines, progress bars and tables of a run."""

    def __init__(
        self,
        *,
        speaks: bool = True,
        ranks: int = 1,
        prints_results: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """speaks: False on every rank but 0. ranks: number of ranks that share the work whose progress is shown.

        prints_results: stdout is for the command's results, so progress goes to stderr. now: a clock, in seconds.
        """
        self._rich = RichConsole(quiet=not speaks, highlight=False, soft_wrap=True)
        self._is_live = speaks and self._rich.is_terminal  # a live view on a silent rank would hide its warnings
        self._view: LiveView | None = None
        self._ranks, self._prints_results = ranks, prints_results
        self._lines = ProgressLines(self._progress_line, now)

    def line(self, text: str) -> None:
        """Print a line. It is a Text, not a str, so that [red] in a model's name or answer is not markup."""
        self._rich.print(Text(escape_control_chars(text)))
        self._lines.printed()

    @contextmanager
    def progress(
        self, what: str, total: int, unit: str = "questions", *, most_tokens: int = 0, announce: bool = False
    ) -> Iterator[Advance]:
        """Show progress: a bar at a terminal, within the live view its last line, elsewhere a line after a silence.

        Yields `advance(done, tokens)`, for this rank's share. most_tokens: of all completions at their length limit.
        announce: elsewhere, print a line at the beginning as well, for work that may be silent for minutes at first.
        """
        shown = self._bar(what, total) if self._is_live and not self._view else None
        with shown or self._lines.follow(Work(what, total, unit, most_tokens), announce=announce) as advance:
            yield lambda done, tokens: advance(done * self._ranks, tokens * self._ranks)

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, *left, console=self._rich, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, tokens: bar.advance(task, done)

    def _progress_line(self, text: str) -> None:
        if self._is_live:
            return  # the live view shows it
        if self._prints_results:
            print(text, file=sys.stderr, flush=True)
        else:
            self.line(text)

    @contextmanager
    def training(self, total: int, history: History, doing: Callable[[], str]) -> Iterator[None]:
        """Show the live view at a terminal and leave its last state there; elsewhere `step` prints a line per step."""
        self.line(LOSS_NOTE)
        if not self._is_live:
            yield
            return
        self._view = LiveView(total, history, lambda: self._lines.text() or doing())
        try:
            with Live(self._view, console=self._rich, refresh_per_second=1):
                yield
        finally:
            self._view = None

    def step(self, metrics: dict[str, float], *, step: int, total: int, seconds_left: float) -> None:
        """Print the line of a step, rewards first and loss last; at a terminal advance the live view."""
        if self._view:
            return self._view.advance_to(step, seconds_left)
        rewards = " ".join(f"{name} {value:.2f}" for metric, value in metrics.items() if (name := reward_name(metric)))
        # A step resumed between its updates was sampled in the run before, so it has no such time.
        seconds = " ".join(f"{phase} {metrics.get(f'seconds/{phase}', 0):.1f}" for phase in PHASES)
        floor = f" (floor {metrics['kl_floor']:.4f})" if metrics.get("kl_floor") else ""
        accuracy = f"accuracy {metrics['accuracy']:.0%}  " if "accuracy" in metrics else ""
        self.line(
            f"step {step:>{len(str(total))}}/{total}  reward {metrics['reward']:.2f} ({rewards})  "
            f"{accuracy}kl {metrics['kl']:.4f}{floor}  "
            f"length {metrics[MEAN_LENGTH]:.0f}  {metrics['tokens_per_second']:.0f} tok/s  {seconds} s  "
            f"{memory_line(metrics)}  loss {metrics['loss']:+.4f}  left {clock(seconds_left)}"
        )

    def plan(self, plan: Plan, gpu_gib: float | None, ram_gib: float) -> None:
        """Print the planned memory of each phase."""
        self._rich.print(phase_table(plan, gpu_gib, ram_gib))

    def prompt(self, question: str, text: str, *, tokens: int) -> None:
        """Print the first prompt as the model reads it, without its middle if it is long. question: its id."""
        shown = text
        if (left_out := len(text) - sum(SHOWN_ENDS)) > 0:
            begin, end = SHOWN_ENDS
            shown = f"{text[:begin]} [... {left_out} characters ...] {text[-end:]}"
        self.line(f"The first prompt, question {question}, {tokens} tokens:\n{shown}")

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Print the first completions with their rewards, before any update."""
        self.line(f"The first {min(len(rows), SAMPLES)} completions, before any update:")
        asked = None
        for row in rows[:SAMPLES]:
            earned = " ".join(
                f"{name.removeprefix('rewards/')} {value:.2f}"
                for name, value in row.items()
                if name.startswith("rewards/") and value is not None
            )
            if row["question"] != asked:
                asked = row["question"]
                label = f"  (right: {row['label']})" if row["label"] else ""
                self.line(f"  {' '.join(asked.split())}{label}")
            self.line(f"    {' '.join(row['completion'].split())}")
            broken = f"  {row['broken_rule']}" if row.get("broken_rule") else ""
            self.line(f"    reward {row['reward']:.2f} ({earned}){broken}")

    def reference(self, kind: str, size: int, floor: float) -> None:
        """Print a new reference's kind, its size in bytes, and the KL at which training starts with it."""
        self.line(
            f"Reference: {kind}, {size / 2**20:.0f} MiB; its KL to the policy it was made from is {floor:.4f} per token"
            f", so the logged KL starts {'there, not at 0' if floor else 'at 0'}."
        )

    def grades(self, when: str, evaluation: Evaluation) -> None:
        """Print the grades of an evaluation in a line. when: a heading such as "Before training"."""
        self.line(f"{when}: {grade_line(evaluation)}")
        self.broken_rules(evaluation)

    def broken_rules(self, evaluation: Evaluation) -> None:
        """Count the rules of the form that answers break, if they do."""
        if rules := rules_line(evaluation.broken):
            self.line(f"{'Ill-formed' if evaluation.grades else 'Completions'}: {rules}")

    def memory(self, profiler: Profiler) -> None:
        """Print each phase's peak beside its plan, and the largest phase."""
        uses = list(profiler.uses().values())
        kinds: list[MemoryKind] = ["gpu", "ram"] if any(use.gpu_peak for use in uses) else ["ram"]
        table = Table(title="Memory by phase, GiB at the peak", title_justify="left")
        table.add_column("")
        table.add_column("seconds", justify="right")
        for kind in kinds:
            for column in (MEMORY_NAMES[kind], "planned", "plan error"):
                table.add_column(column, justify="right")
        compared = {kind: compare(uses, profiler.plan, kind) for kind in kinds}
        for i, use in enumerate(uses):
            cells = [cell for kind in kinds for cell in _memory_cells(compared[kind][i])]
            table.add_row(use.phase, f"{use.seconds:.1f}", *cells)
        self._rich.print(table)
        if "gpu" in kinds:
            reserved, pinned = max(use.gpu_reserved for use in uses), max(use.pinned for use in uses)
            self.line(f"torch held {reserved / GIB:.2f} GiB of GPU memory and {pinned / GIB:.2f} GiB of pinned RAM.")
        for kind in kinds:
            self.line(diagnosis(compared[kind], profiler.plan, kind))
        if not profiler.exact and "gpu" not in kinds:
            self.line(STALE_NOTE.format(command("profile")))

    def before_and_after(
        self,
        before: Evaluation,
        after: Evaluation,
        questions: Sequence[Question],
        *,
        names: tuple[str, str] = ("before", "after"),
    ) -> None:
        """Print the grades before and after training, with the paired tests and the majority baseline.

        names: of two other sides, such as two models.
        """
        self.figures(dict(zip(names, (before, after), strict=True)), len(questions))
        for line in change_lines({**before.figures(), **paired_tests(questions, before, after)}):
            self.line(line)

    def figures(self, sides: Mapping[str, Evaluation], count: int) -> None:
        """Print the grades of evaluations of the same questions side by side. count: of the questions."""
        table = Table(title=f"Held-out questions ({count}, greedy)", title_justify="left")
        table.add_column("")
        for name in sides:
            table.add_column(Text(escape_control_chars(name)), justify="right")
        figures = [side.figures() for side in sides.values()]
        for name, show in [*grade_rows(figures), *confidence_rows(figures), *reward_rows(figures)]:
            table.add_row(Text(escape_control_chars(name)), *(escape_control_chars(show(side)) for side in figures))
        self._rich.print(table)


def _memory_cells(row: Comparison) -> list[str]:
    planned = "" if row.planned is None else f"{row.planned / GIB:.2f}"
    return [f"{row.measured / GIB:.2f}", planned, "" if row.error is None else f"{row.error:+.1%}"]
