"""What a person reads while a run goes on: rank 0 alone speaks, in plain lines when not at a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo_ds.evaluation import Evaluation
from grpo_ds.task.grading import Grades, mcnemar
from grpo_ds.task.questions import Question

PLAIN_WIDTH = 160  # columns of a log file: one step stays one line


class Console:
    """Lines, progress bars and the tables of a run."""

    def __init__(self, *, speaks: bool = True) -> None:
        self._rich = RichConsole(quiet=not speaks, highlight=False, soft_wrap=True)
        self._is_live = self._rich.is_terminal

    def line(self, text: str) -> None:
        self._rich.print(Text(text))

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with time left at a terminal, nothing otherwise; yields `advance(by)`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, *left, console=self._rich, transient=True, disable=not self._is_live) as bar:
            task = bar.add_task(what, total=total)
            yield lambda by: bar.advance(task, by)

    def step(self, metrics: dict[str, float], *, step: int, total: int, seconds_left: float) -> None:
        """One line a step: rewards first, loss last, for the loss of a first update is always near 0."""
        rewards = " ".join(
            f"{name.removeprefix('rewards/')} {value:.2f}"
            for name, value in metrics.items()
            if name.startswith("rewards/")
        )
        seconds = " ".join(f"{phase} {metrics[f'seconds/{phase}']:.1f}" for phase in ("sample", "score", "update"))
        memory = f"RAM {metrics['memory/ram_gib']:.1f}G"
        if "memory/gpu_peak_gib" in metrics:
            memory += f" GPU {metrics['memory/gpu_peak_gib']:.1f}G"
        self.line(
            f"step {step:>{len(str(total))}}/{total}  reward {metrics['reward']:.2f} ({rewards})  "
            f"kl {metrics['kl']:.4f}  length {metrics['completion_length']:.0f}  "
            f"{metrics['tokens_per_second']:.0f} tok/s  {seconds} s  {memory}  "
            f"loss {metrics['loss']:+.4f}  left {_clock(seconds_left)}"
        )

    def before_and_after(self, before: Evaluation, after: Evaluation, questions: Sequence[Question]) -> None:
        """The held-out questions before and after training, with what chance and a constant answer would give."""
        table = Table(title=f"Held-out questions ({before.grades.count}, greedy)", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for name, show in _rows(before.grades):
            table.add_row(name, show(before.grades), show(after.grades))
        width = None if self._is_live else PLAIN_WIDTH
        self._rich.print(table, width=width)
        correct = [[a == q.label for a, q in zip(e.answers, questions, strict=True)] for e in (before, after)]
        self.line(
            f"Always answering the commonest label scores {before.grades.majority_baseline:.1%}.  "
            f"McNemar p = {mcnemar(*correct):.3f}"
        )
        if after.grades.collapsed:
            self.line("Warning: nearly all answers are one class; accuracy then says little (see macro-F1).")


def _rows(grades: Grades) -> list[tuple[str, Callable[[Grades], str]]]:
    recalls = [(f"recall {label}", lambda g, label=label: f"{g.recall[label]:.1%}") for label in grades.recall]
    return [
        ("accuracy", lambda g: f"{g.accuracy:.1%}"),
        ("  95 % interval", lambda g: "{:.1%} to {:.1%}".format(*g.accuracy_interval)),
        ("macro-F1", lambda g: f"{g.macro_f1:.3f}"),
        *recalls,
        ("well-formed", lambda g: f"{g.well_formed:.1%}"),
    ]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
