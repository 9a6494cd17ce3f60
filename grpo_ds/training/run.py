"""A run's life around the steps: evaluation before and after, logging, checkpoints, the saved model.

However it ends (done, a signal, an error), what was learned is in the folder and run_status.json says so.
"""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grpo_ds.errors import BY_CTRL_C, CheckpointError, GrpoError, NumbersError
from grpo_ds.memory.phases import OutOfMemory
from grpo_ds.models.policy import save_merged, save_model
from grpo_ds.report import environment, held_out
from grpo_ds.report.memory import write_memory
from grpo_ds.report.model_card import write_card
from grpo_ds.report.trackers import Tracker, make_trackers, write_summary
from grpo_ds.run_folder.checkpoints import folder_of, renamed_into
from grpo_ds.run_folder.lock import cannot_be_written, release, take
from grpo_ds.run_folder.progress import strict
from grpo_ds.run_folder.status import RunStatus, resume_command
from grpo_ds.settings.config import write_config
from grpo_ds.system.ranks import stop
from grpo_ds.system.signals import Interrupted, Stopping, name
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards, joined
from grpo_ds.training import checkpoint as snapshot
from grpo_ds.training.nonfinite import refuse_bad_weights
from grpo_ds.training.trainer import Trainer

EVAL_ACCURACY = "eval/accuracy"  # a line of its own in metrics.jsonl
MERGED = "merged"  # in the run's folder: an adapter beside a whole model would be loaded on top of it


@dataclass(frozen=True)
class Outcome:
    """What a run achieved."""

    rewards: list[float]  # mean reward of each step, over all ranks
    before: Evaluation
    after: Evaluation

    def quarters(self) -> tuple[float, float]:
        """Mean reward of the first and of the last quarter of the steps."""
        size = max(1, len(self.rewards) // 4)
        return sum(self.rewards[:size]) / size, sum(self.rewards[-size:]) / size

    def summary(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What trackers keep of the whole run."""
        rewards = {"steps": len(self.rewards), "reward_first": self.rewards[0], "reward_last": self.rewards[-1]}
        return {**rewards, **held_out.grades(questions, {"before": self.before, "after": self.after})}


class Run:
    """A trainer, its questions, and the folder into which rank 0 writes."""

    def __init__(self, trainer: Trainer, train: list[Question], held_out: Sequence[Question], folder: Path) -> None:
        self.trainer, self.questions, self.held_out, self.folder = trainer, train, held_out, folder
        self.config, self.progress, self.console = trainer.config, trainer.progress, trainer.console
        self.writes, trainer.bad_steps.folder = trainer.world.is_first, folder
        self.best = self.progress.best_metric, self.progress.best_global_step
        self.saved_at: tuple[int, int] | None = None  # steps, and updates on the next one's rollout
        self.trackers: list[Tracker] = []
        self.status = RunStatus(folder, max_steps=self.config.total_steps, speaks=self.writes)

    def whole(self) -> Outcome:
        """Evaluate, train, evaluate, save. Whatever ends it early, what can be saved is."""
        trainer = self.trainer
        # A question too long for its budget stops us here.
        trainer.collector.style.encode(trainer.tokenizer, [*self.questions, *self.held_out])
        if self.config.preflight:
            trainer.preflight()
        with trainer.interruption.noted():  # also while what is left is saved
            self._begin()
            try:
                return self._in_order()
            except Stopping:
                raise self._stopped() from None
            except GrpoError as error:
                self._failed(error)
                raise
            except BaseException as error:
                code = BY_CTRL_C if isinstance(error, KeyboardInterrupt) else 1
                self.status.write("failed", exit_code=code, message=f"{type(error).__name__}: {error}".strip(": "))
                raise
            finally:
                release(self.folder)

    def _begin(self) -> None:
        if not self.writes:
            return
        take(self.folder)
        try:
            write_config(self.config, self.folder)
            environment.write_environment(self.folder, ranks=self.trainer.world.size)
        except OSError as error:
            raise cannot_be_written(self.folder, error) from None

    def _in_order(self) -> Outcome:
        trainer, progress = self.trainer, self.progress
        self.status.write("evaluating", step=progress.global_step)
        if progress.before is None:
            progress.before = trainer.evaluate("Before training", self.held_out).texts
        before = graded(progress.before, self.held_out, trainer.collector.style.answer_format)
        self.write_held_out({"before": before})
        rewards = self.train()
        self.status.write("evaluating", step=progress.global_step)
        after = trainer.evaluate("After training", self.held_out)
        outcome = Outcome(rewards, before, after)
        self.save_model()
        self.write_held_out({"before": before, "after": after})
        self.report_memory()
        self._report(outcome)
        return outcome

    def _report(self, outcome: Outcome) -> None:
        """What the folder says of the whole run, and then the trackers, which may have to wait for a network."""
        counts = {"train": len(self.questions), "held_out": len(self.held_out)}
        summary = {**outcome.summary(self.held_out), "questions": counts}
        if self.writes:
            with self._at_most_a_warning("summary or model card"):
                write_summary(self.folder, summary)
                write_card(self.folder)
        self.status.write("done", exit_code=0)
        self.report_page()
        try:
            for tracker in self.trackers:
                if where := tracker.finish(summary):
                    self.console.line(f"{tracker.name}: {where}")
        except KeyboardInterrupt:
            self.console.line("Trackers were not waited for; everything is in the folder.")

    def train(self) -> list[float]:
        """All steps that are left, each logged, and saved where it is time; the mean reward of every step."""
        trainer, progress, total = self.trainer, self.progress, self.config.total_steps
        self.trackers = make_trackers(self.config, self.folder, progress) if self.writes else []
        started, first = time.monotonic(), progress.global_step
        with self.console.training(total, progress.log_history, lambda: trainer.profiler.doing):
            self.evaluate_if_due()  # the run before was stopped in it
            for metrics in trainer.steps(self.questions):
                step = progress.global_step
                self.log(metrics)
                self.log_completions(step)
                left = (time.monotonic() - started) / (step - first) * (total - step)
                self.console.step(metrics, step=step, total=total, seconds_left=left)
                self.status.write("training", step=step)
                trainer.safe_point()
                self.evaluate_if_due()
                if self.config.saves_at(step):
                    self.save_checkpoint()
        return progress.rewards

    def log(self, metrics: dict[str, float]) -> None:
        """Into the history that checkpoints keep, and wherever --report_to says."""
        step = self.progress.global_step
        self.progress.log_history.append({"step": step, **strict(metrics)})
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def log_completions(self, step: int) -> None:
        for tracker in self.trackers if self.config.log_completions else ():
            tracker.completions(self.trainer.completions, step=step)

    def write_held_out(self, evaluations: dict[str, Evaluation]) -> None:
        """held_out.json. Rewards are for the end: a function of the user's own may count how often it is called."""
        if self.writes:
            over = "after" in evaluations
            score = self._score_in_parts if over else None
            with self._at_most_a_warning(held_out.HELD_OUT_FILE):
                held_out.write_held_out(self.folder, self.held_out, evaluations, score)

    def _score_in_parts(self, texts: Sequence[str], questions: Sequence[Question]) -> Rewards:
        """As many in a call as in training, for the time a reward function may take is meant for those."""
        size, score = self.config.batch_size * self.config.num_generations, self.trainer.collector.score
        parts = [
            score(texts[start : start + size], questions[start : start + size], on_error="zero")
            for start in range(0, len(texts), size)
        ]
        rewards = joined(parts)
        for error in rewards.errors.values():
            self.console.line(f"Warning: {error}\nIn {held_out.HELD_OUT_FILE} these answers go without.")
        return rewards

    def evaluate_if_due(self) -> None:
        """The held-out questions between two steps, once; the best of those that are saved is remembered."""
        progress, every, step = self.progress, self.config.eval_steps, self.progress.global_step
        done = any(EVAL_ACCURACY in line for line in progress.log_history if line["step"] == step)
        if not every or not step or step % every or step == self.config.total_steps or done:
            return
        grades = self.trainer.evaluate(f"After step {step}", self.held_out).grades
        if self.config.saves_at(step) and (progress.best_metric is None or grades.accuracy > progress.best_metric):
            progress.best_metric, progress.best_global_step = grades.accuracy, step
        shares = {EVAL_ACCURACY: grades.accuracy, "eval/macro_f1": grades.macro_f1}
        self.log({**shares, "eval/well_formed": grades.well_formed})

    def save_checkpoint(self) -> None:
        """At its time. Where it cannot be written the run goes on: the last one is whole, and stopping loses more."""
        try:
            self.status.write("training", **self._save())
            self.best = self.progress.best_metric, self.progress.best_global_step
        except CheckpointError as error:
            if self.trainer.world.size > 1:
                raise
            self.progress.best_metric, self.progress.best_global_step = self.best  # of those that were saved
            self.console.line(f"Warning: {error}\nTraining goes on; the next one is tried at its time.")

    def _stopped(self) -> Interrupted:
        """A signal came: everything is saved, and how to go on is said."""
        signum, step = self.trainer.interruption.signum, self.progress.global_step
        try:
            where = self._save()
        except GrpoError as error:
            self.status.write("failed", exit_code=error.exit_code, message=str(error), step=step)
            raise
        stopped = Interrupted(
            f"{name(signum)}: stopped at step {step} of {self.config.total_steps}, saved in {where['checkpoint']}.\n"
            f"Go on with: {where['resume']}",
            signum,
        )
        self.status.write("stopped", exit_code=stopped.exit_code, step=step, **where)
        return stopped

    def _failed(self, error: GrpoError) -> None:
        """Save what is sound, so that the steps up to here are not paid for twice, and say so."""
        step, where = self.progress.global_step, dict[str, str]()
        if self._is_sound(error):
            try:
                where = self._save()
                further = f"Go on with: {where['resume']}"
                if isinstance(error, NumbersError):  # the same numbers would come again
                    where.pop("resume")
                    further = f"To train on from there with other settings: --model {shlex.quote(where['checkpoint'])}"
                self.console.line(f"Saved up to step {step}. {further}")
            except GrpoError as second:
                self.console.line(f"Nothing more could be saved: {str(second).splitlines()[0]}")
        self.status.write("failed", exit_code=error.exit_code, message=str(error), step=step, **where)

    def _save(self) -> dict[str, str]:
        """A checkpoint of this very moment, and how to go on from it."""
        trainer = self.trainer
        moment = self.progress.global_step, trainer.partial_step.updates if trainer.partial_step else 0
        if moment != self.saved_at:
            snapshot.write(trainer, self.folder)
            self.saved_at = moment
        checkpoint = folder_of(self.folder, moment[0])
        command = resume_command(checkpoint, trust_remote_code=self.config.trust_remote_code)
        return {"checkpoint": str(checkpoint), "resume": command}

    def _is_sound(self, error: GrpoError) -> bool:
        """Whether weights and moments belong together after this error, on every rank, and none is saved yet."""
        half_done = isinstance(error, OutOfMemory) and error.phase in ("sync", "step", "save", "resume")
        if half_done or isinstance(error, CheckpointError) or self.progress.global_step == 0:
            return False
        if isinstance(error, OutOfMemory) and error.phase == "update":
            self.trainer.engine.abandon()
        return self.trainer.world.size == 1 or error.on_every_rank

    def save_model(self) -> None:
        """The fine-tuned model as an ordinary transformers folder, or its adapter and if asked for the merged model."""
        refuse_bad_weights(self.trainer.engine.model)
        if self.writes:
            try:
                with self.trainer.profiler.phase("save"), renamed_into(self.folder) as folder:
                    self._write_model(folder)
            except (OSError, RuntimeError, SafetensorError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                raise CheckpointError(f"The model could not be written to {self.folder}: {reason}") from error
        self.trainer.world.wait()

    def _write_model(self, folder: Path) -> None:
        trainer, config = self.trainer, self.config
        save_model(trainer.engine.model, folder)
        trainer.tokenizer.save_pretrained(folder)
        if config.merge_adapter:
            dtype, trust = torch.bfloat16 if trainer.ds.bf16 else torch.float32, config.trust_remote_code
            save_merged(folder, folder / MERGED, dtype=dtype, trust_remote_code=trust)
            trainer.tokenizer.save_pretrained(folder / MERGED)
            write_config(config, folder / MERGED)  # how the model wants to be asked
        self.progress.write(folder)

    def report_memory(self) -> None:
        """The table of phases, and memory.json and memory.svg in the folder."""
        with self._at_most_a_warning("memory report"):
            self.console.memory(self.trainer.profiler)
            if self.writes:
                self.console.line("Written: {} and {}".format(*write_memory(self.trainer.profiler, self.folder)))

    def report_page(self) -> None:
        """report.html in the folder. It can be made again at any time, so nothing about it fails a run that is done."""
        if not self.writes:
            return
        with self._at_most_a_warning("report"):
            from grpo_ds.report.page import write_page

            self.console.line(f"Report: {write_page(self.folder)}")

    @contextmanager
    def _at_most_a_warning(self, what: str) -> Iterator[None]:
        """What is only told of a run must not end it, whatever is wrong with it: a disk, a library, ourselves."""
        try:
            yield
        except Exception as error:
            self.console.line(f"Warning: no {what} was written ({type(error).__name__}: {error}).")

    def close(self) -> None:
        """Release the engine and leave the ranks."""
        self.trainer.engine.close()
        stop()
