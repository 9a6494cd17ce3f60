"""Reports that a run writes: answers, memory, summary, model card, page. A failure here is only a warning."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ds.report import verdict
from grpo_ds.report.held_out import grades, write_held_out
from grpo_ds.report.memory_measured import write_memory
from grpo_ds.report.model_card import write_card
from grpo_ds.report.run_files import read_run
from grpo_ds.report.trackers import write_summary
from grpo_ds.run_folder.files import HELD_OUT_FILE
from grpo_ds.system.invocation import command
from grpo_ds.task.grading import Evaluation
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Example:
        Outcome(rewards=[0.56, 0.70, 0.85], questions, before=evaluation, after=evaluation).quarters()  # (0.56, 0.85)
    """

    rewards: list[float]  # mean reward of each step, over all ranks
    questions: Sequence[Question]  # held-out questions that were answered both times
    before: Evaluation
    after: Evaluation

    def quarters(self) -> tuple[float, float]:
        """Mean reward of the first and of the last quarter of the steps."""
        size = max(1, len(self.rewards) // 4)
        return sum(self.rewards[:size]) / size, sum(self.rewards[-size:]) / size

    def summary(self) -> dict[str, Any]:
        """Figures of the complete run, for summary.json and the trackers."""
        rewards = {"steps": len(self.rewards), "reward_first": self.rewards[0], "reward_last": self.rewards[-1]}
        return {**rewards, **grades(self.questions, {"before": self.before, "after": self.after})}


class Reports:
    """Writes the reports of a run into its folder, on rank 0."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.config, self.console, self.writes = trainer.config, trainer.console, trainer.world.is_first

    def summary(self, outcome: Outcome, *, train: int) -> dict[str, Any]:
        """Write summary.json and the model card; return the summary. train: number of training questions."""
        counts = {"train": train, "held_out": len(outcome.questions)}
        summary = {**outcome.summary(), "questions": counts, **self._of_the_model()}
        if self.writes:
            with self._at_most_a_warning("summary or model card"):
                write_summary(self.folder, summary)
                write_card(self.folder)
        return summary

    def _of_the_model(self) -> dict[str, Any]:
        """Facts about the model that the verdict needs (report/verdict.py)."""
        ds = self.trainer.ds
        return {
            "parameters": self.trainer.engine.model.num_parameters(),
            "precision": ds.precision,
            # DeepSpeed's own Adam rounds bf16 masters to the nearest; ours keeps what they cannot hold.
            "weights_changed": self.trainer.progress.weights_changed,
            "keeps_small_steps": not ds.bf16_masters or ds.optimizer.ours,
            "optimizer": ds.optimizer.type,
        }

    def held_out(self, questions: Sequence[Question], evaluations: dict[str, Evaluation]) -> None:
        """Write held_out.json; rewards are added only at the end, because a user's function may count its calls."""
        if self.writes:
            score = self._score if "after" in evaluations else None
            with self._at_most_a_warning(HELD_OUT_FILE):
                write_held_out(self.folder, questions, evaluations, score)

    def _score(self, texts: Sequence[str], questions: Sequence[Question]) -> Rewards:
        rewards = self.trainer.collector.held_out_rewards(texts, questions)
        for error in rewards.errors.values():
            self.console.line(f"Warning: {error}\nThese answers have no such reward in {HELD_OUT_FILE}.")
        return rewards

    def memory(self) -> None:
        """Print the table of phases; write memory.json and memory.svg."""
        with self._at_most_a_warning("memory report"):
            self.console.memory(self.trainer.profiler)
            if self.writes:
                self.console.line("Written: {} and {}".format(*write_memory(self.trainer.profiler, self.folder)))

    def page(self) -> None:
        """Write report.html. It can be made again at any time, so a failure does not end the run."""
        if not self.writes:
            return
        with self._at_most_a_warning("report"):
            from grpo_ds.report.page import write_page

            self.console.line(f"Report: {write_page(self.folder)}")

    def verdict(self) -> None:
        """Print if the run learned, and why not: the same verdict as in the report and the model card."""
        if self.writes:
            with self._at_most_a_warning("verdict"):
                found = verdict.of(read_run(self.folder))
                for line in found.lines(command("train"), shlex.quote(str(self.folder))):
                    self.console.line(line)

    @contextmanager
    def _at_most_a_warning(self, what: str) -> Iterator[None]:
        """Turn any error of a report into a warning: a full disk, a library or our own bug must not end the run."""
        try:
            yield
        except Exception as error:
            self.console.line(f"Warning: no {what} was written ({type(error).__name__}: {error}).")
