"""A run around its steps: evaluation before and after, logging, checkpoints, the saved model.

If it ends early (signal, error), its folder holds the result so far, and run_status.json the state.
"""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_ds.errors import BY_CTRL_C, CheckpointError, GrpoError, NumbersError
from grpo_ds.memory.phases import OutOfMemory
from grpo_ds.models.base_weights import base_hash
from grpo_ds.models.chat_texts import chat_texts, save_tokenizer
from grpo_ds.models.policy import save_merged, save_model
from grpo_ds.report.environment import write_environment
from grpo_ds.report.trackers import Tracker, make_trackers
from grpo_ds.run_folder.checkpoints import folder_of, renamed_into
from grpo_ds.run_folder.files import MERGED
from grpo_ds.run_folder.inputs import BASE
from grpo_ds.run_folder.lock import cannot_be_written
from grpo_ds.run_folder.progress import Progress, strict
from grpo_ds.run_folder.status import CHANGED_INPUTS, RunStatus, resume_command
from grpo_ds.system.invocation import typed_here
from grpo_ds.system.signals import Interrupted, Stopping, name
from grpo_ds.task.grading import evaluation_metrics, is_evaluation
from grpo_ds.task.questions import Question
from grpo_ds.training.checkpoint import save_checkpoint, write_beside
from grpo_ds.training.engine import leave_group
from grpo_ds.training.nonfinite import refuse_bad_weights
from grpo_ds.training.precision import DTYPES
from grpo_ds.training.prompt_style import forget_prompts
from grpo_ds.training.rehearsal import rehearse
from grpo_ds.training.reports import Outcome, Reports
from grpo_ds.training.trainer import Trainer


class Run:
    """A trainer, its questions, and the folder into which rank 0 writes."""

    def __init__(self, trainer: Trainer, train: list[Question], held_out: Sequence[Question], folder: Path) -> None:
        self.trainer, self.questions, self.held_out, self.folder = trainer, train, held_out, folder
        self.config, self.console = trainer.config, trainer.console
        self.writes = trainer.world.is_first
        trainer.use_folder(folder)
        self.best = self.progress.best_metric, self.progress.best_global_step
        self.saved_at: tuple[int, int] | None = None  # (steps done, updates done on the next step's rollout)
        self.trackers: list[Tracker] = []
        self.reports = Reports(trainer, folder)
        self.status = RunStatus(folder, max_steps=self.config.total_steps, speaks=self.writes)

    @property
    def progress(self) -> Progress:
        """The trainer's progress."""
        return self.trainer.progress

    def run(self) -> Outcome:
        """Evaluate, train, evaluate, save; after a signal or an error save as much as possible."""
        trainer = self.trainer
        self._check_inputs()
        if self.config.preflight:
            trainer.preflight()
        with trainer.interruption.noted():  # also during the last save
            self._begin()
            try:
                return self._run()
            except Stopping:
                raise self._stopped() from None
            except GrpoError as error:
                self._failed(error)
                raise
            except BaseException as error:
                code = BY_CTRL_C if isinstance(error, KeyboardInterrupt) else 1
                self.status.write("failed", exit_code=code, message=f"{type(error).__name__}: {error}".strip(": "))
                raise

    def _check_inputs(self) -> None:
        """Encode every prompt: one that is too long, or not what it was, stops the run before it begins.

        So does another base of an adapter, if it came from the hub.
        """
        style, tokenizer = self.trainer.collector.style, self.trainer.tokenizer
        asked, texts = [*self.questions, *self.held_out], chat_texts(tokenizer)
        prompts = style.encode(tokenizer, asked)
        if (shared := self.trainer.world.gather(texts)[0]) != texts:  # it was another day on that rank
            texts.update(shared)
            prompts = style.encode_again(tokenizer, asked)
        config, may_change = self.config, self.config.resume_changed_inputs
        if config.lora_r and not Path(config.model).is_dir() and (base := base_hash(config.model)):
            self.progress.check_late(BASE, base, may_change=may_change)
        trained = prompts[: len(self.questions)]  # --eval_limit may change the others
        if line := self.progress.check_prompts(trained, may_change=may_change):
            self.console.line(line)
        if not self.progress.global_step:
            first = self.trainer.collector.rank_questions(0, self.questions, config.seed)[0]
            (prompt,) = style.shown(tokenizer, [first])
            self.console.prompt(first.id, prompt.text, tokens=len(style.encode(tokenizer, [first])[0]))

    def _begin(self) -> None:
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_beside(self.trainer, self.folder)
            write_environment(self.folder, ranks=self.trainer.world.size)
        except OSError as error:
            raise cannot_be_written(self.folder, error) from None

    def _run(self) -> Outcome:
        trainer, progress = self.trainer, self.progress
        changes = progress.changes()
        self.status.write("evaluating", step=progress.global_step, **({CHANGED_INPUTS: changes} if changes else {}))
        answered, form = self._answered_before(), self.config.answer_format
        compared = list(answered)
        before = progress.evaluation_before(answered, form)
        self.reports.held_out(compared, {"before": before})
        rewards = self.train()
        self.status.write("evaluating", step=progress.global_step)
        after = trainer.evaluate("After training", self.held_out)
        if len(compared) < len(self.held_out):
            after = after.of([self.held_out.index(question) for question in compared], self.held_out, form)
        outcome = Outcome(rewards, compared, before, after)
        self.save_model()
        self.reports.held_out(compared, {"before": before, "after": after})
        self.reports.memory()
        summary = self.reports.summary(outcome, train=len(self.questions))
        self.status.write("done", exit_code=0)
        self.reports.page()
        self._finish_trackers(summary)
        return outcome

    def _answered_before(self) -> dict[Question, str]:
        """Return the held-out questions that were answered before training, with their answers.

        A run that was resumed with other questions only (--resume_changed_inputs) answers them now.
        """
        progress = self.progress
        if not (answered := progress.answered_before(self.held_out)):
            when = f"Before step {progress.global_step + 1}" if progress.global_step else "Before training"
            progress.keep_before(self.held_out, self.trainer.evaluate(when, self.held_out))
            answered = progress.answered_before(self.held_out)
        if len(answered) < len(self.held_out):
            self.console.line(
                f"{len(answered)} of {len(self.held_out)} held-out questions were answered before training; "
                "before and after are compared on these."
            )
        return answered

    def _finish_trackers(self, summary: dict[str, Any]) -> None:
        """Let the trackers finish; they may wait for a network."""
        try:
            for tracker in self.trackers:
                if where := tracker.finish(summary):
                    self.console.line(f"{tracker.name}: {where}")
        except KeyboardInterrupt:
            self.console.line("Stopped waiting for the trackers; everything is in the folder.")

    def train(self) -> list[float]:
        """Run the remaining steps, log each, save when due; return the mean reward of every step."""
        trainer, progress, total = self.trainer, self.progress, self.config.total_steps
        self.trackers = make_trackers(self.config, self.folder, progress) if self.writes else []
        started, first = time.monotonic(), progress.global_step
        with self.console.training(total, progress.log_history, lambda: trainer.profiler.doing):
            self.evaluate_if_due()  # the run may have been stopped while it evaluated
            if self.config.dry_run_worst_case and progress.global_step == 0 and trainer.partial_step is None:
                trainer.refresh_reference(0, self.questions)
                rehearse(trainer)
            for metrics in trainer.steps(self.questions):
                step = progress.global_step
                self.log(metrics)
                self.log_completions(step)
                left = (time.monotonic() - started) / (step - first) * (total - step)
                self.console.step(metrics, step=step, total=total, seconds_left=left)
                self.status.write("training", step=step)
                trainer.guard.safe_point()
                self.evaluate_if_due()
                if self.config.saves_at(step):
                    self.save_checkpoint()
        return progress.rewards

    def log(self, metrics: dict[str, float]) -> None:
        """Add a line to the history that checkpoints keep, and send it to the trackers."""
        step = self.progress.global_step
        self.progress.log_history.append({"step": step, **strict(metrics)})
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def log_completions(self, step: int) -> None:
        """Send the step's completions to the trackers if --log_completions asks for it."""
        for tracker in self.trackers if self.config.log_completions else ():
            tracker.completions(self.trainer.completions, step=step)

    def evaluate_if_due(self) -> None:
        """Evaluate during training every --eval_steps, once a step, and note the best saved step."""
        step, progress = self.progress.global_step, self.progress
        due = self.config.eval_steps and step and step % self.config.eval_steps == 0 and step < self.config.total_steps
        if not due or any(line["step"] == step and is_evaluation(line) for line in progress.log_history):
            return
        evaluation = self.trainer.evaluate(f"After step {step}", self.held_out, briefly=True)
        quality, best = evaluation.quality, progress.best_metric
        if self.config.saves_at(step) and quality is not None and (best is None or quality > best):
            progress.set_best(quality, step)
        self.log(evaluation_metrics(evaluation))

    def save_checkpoint(self) -> None:
        """Save a checkpoint. If it cannot be written, the run continues: stopping would lose more."""
        try:
            self.status.write("training", **self._save())
            self.best = self.progress.best_metric, self.progress.best_global_step
        except CheckpointError as error:
            if self.trainer.world.size > 1:
                raise
            self.progress.set_best(*self.best)  # the best that was saved
            self.console.line(f"Warning: {error}\nTraining continues; the next checkpoint is written when it is due.")

    def _stopped(self) -> Interrupted:
        """Save everything after a signal; return the error that says how to resume."""
        signum, step = self.trainer.interruption.signum, self.progress.global_step
        try:
            where = self._save()
        except GrpoError as error:
            self.status.write("failed", exit_code=error.exit_code, message=str(error), step=step)
            raise
        stopped = Interrupted(
            f"{name(signum)}: stopped at step {step} of {self.config.total_steps}, saved in {where['checkpoint']}.\n"
            f"Resume with: {typed_here(where['resume'])}",
            signum,
        )
        self.status.write("stopped", exit_code=stopped.exit_code, step=step, **where)
        return stopped

    def _failed(self, error: GrpoError) -> None:
        """Save the steps so far after an error, if the state is sound, and report it."""
        step, where = self.progress.global_step, dict[str, str]()
        if self._is_sound(error):
            try:
                where = self._save()
                further = f"Resume with: {typed_here(where['resume'])}"
                if isinstance(error, NumbersError):  # resuming would give the same numbers again
                    where.pop("resume")
                    further = f"To train further with other settings: --model {shlex.quote(where['checkpoint'])}"
                self.console.line(f"Saved up to step {step}. {further}")
            except GrpoError as second:
                self.console.line(f"Nothing more could be saved: {str(second).splitlines()[0]}")
        self.status.write("failed", exit_code=error.exit_code, message=str(error), step=step, **where)

    def _save(self) -> dict[str, str]:
        """Save the current state unless it is saved already; return the checkpoint and the command that resumes."""
        partial = self.trainer.partial_step
        moment = self.progress.global_step, partial.updates if partial else 0
        if moment != self.saved_at:
            save_checkpoint(self.trainer, self.folder)
            self.saved_at = moment
        checkpoint = folder_of(self.folder, moment[0])
        command = resume_command(checkpoint, trust_remote_code=self.config.trust_remote_code)
        return {"checkpoint": str(checkpoint), "resume": command}

    def _is_sound(self, error: GrpoError) -> bool:
        """Return True if weights and moments still belong together on every rank, and there is something to save."""
        half_done = isinstance(error, OutOfMemory) and error.phase in ("sync", "step", "save", "resume")
        if half_done or isinstance(error, CheckpointError) or self.progress.global_step == 0:
            return False
        if isinstance(error, OutOfMemory) and error.phase == "update":
            self.trainer.engine.abandon()
        return self.trainer.world.size == 1 or error.on_every_rank

    def save_model(self) -> None:
        """Write a transformers folder: the model, or its adapter and, if asked for, the merged model."""
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
        trainer.count_changed_weights()
        save_model(trainer.engine.model, folder)
        save_tokenizer(trainer.tokenizer, folder)
        write_beside(trainer, folder)  # both again: users' code may have deleted them
        write_environment(folder, ranks=trainer.world.size)
        if config.merge_adapter:
            dtype, trust = DTYPES[trainer.ds.precision], config.trust_remote_code
            save_merged(folder, folder / MERGED, dtype=dtype, trust_remote_code=trust)
            save_tokenizer(trainer.tokenizer, folder / MERGED)
            write_beside(trainer, folder / MERGED)
        trainer.state_dict()["progress"].write(folder)

    def close(self) -> None:
        """Release the engine, leave the process group, forget the prompts."""
        self.trainer.engine.close()
        leave_group()
        forget_prompts()
