"""The trainer: a policy, its engine, and the steps of GRPO.

Algorithm 1 of DeepSeekMath (Shao et al. 2024) has three loops: its outer loop, a new reference, is
`Trainer.refresh_reference`; its middle loop is `Trainer.steps`; its mu updates are in `Trainer.step`. A step is eight
calls, in three groups that the guard surrounds:

    collect         training/collect.py
        questions_at        task/questions.py           questions of the step
        encode              training/prompt_style.py    prompts as token ids
        sampler             training/sampling.py        G completions of each prompt
        score               task/scoring.py             rewards
    make_rollout    training/rollout.py
        group_advantages    core/advantages.py          each reward compared with its group's
        reference           models/reference.py         log-probs over packed rows (core/packing.py)
    update          training/update.py
        grpo_loss           core/losses.py              from the policy's log-probs (models/logprob_model.py)
        backward, step      training/engine.py          gradients, optimizer

run.py does the evaluation, logging, checkpoints and signals around the steps.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_ds.core.tally import Tally
from grpo_ds.memory.limits import Limits
from grpo_ds.memory.phases import Profiler
from grpo_ds.memory.plan import Plan
from grpo_ds.models.logprob_model import why_not_packed
from grpo_ds.models.policy import load_tokenizer, trainable_policy
from grpo_ds.models.reference import Reference, kl_floor, make_reference, restore_reference
from grpo_ds.models.stored_weights import store_weights
from grpo_ds.report.console import Console
from grpo_ds.run_folder.progress import Progress
from grpo_ds.run_folder.resume import weights_of
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.system.determinism import fix_workspaces
from grpo_ds.system.ranks import World
from grpo_ds.system.signals import Interruption
from grpo_ds.task.grading import Evaluation
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import WeightedFunctions
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.collect import Collector
from grpo_ds.training.draws import seed_at
from grpo_ds.training.engine import Engine
from grpo_ds.training.evaluate import evaluate
from grpo_ds.training.flat_rewards import flat_rewards
from grpo_ds.training.guard import Guard
from grpo_ds.training.label_tokens import label_ids_for
from grpo_ds.training.metrics import step_metrics
from grpo_ds.training.nonfinite import NonfiniteSteps
from grpo_ds.training.precision import DTYPES, check_card
from grpo_ds.training.preflight import preflight
from grpo_ds.training.prompt_style import PromptStyle, prompt_style
from grpo_ds.training.rollout import Groups, PartialStep, Rollout, make_rollout
from grpo_ds.training.sampling import Sampler
from grpo_ds.training.update import Updated, update
from grpo_ds.training.weight_sample import as_hex, sampled_weights, share_changed, share_moved


class Trainer:
    """A policy, its engine and everything a step needs."""

    def __init__(
        self,
        config: TrainConfig,
        ds: DsConfig,
        world: World,
        console: Console,
        reward_functions: WeightedFunctions,
        plan: Plan | None = None,
        *,
        origin: Path | None = None,
        identity: Mapping[str, str] | None = None,
        trained_on: Collection[str] | None = None,
        exact_memory: bool = False,
        style: PromptStyle | None = None,
    ) -> None:
        """origin: checkpoint to resume from; tokenizer and weights then come from it, not from config.model.

        identity: hashes of inputs, which checkpoints keep (run_folder/inputs.py). trained_on:
        fingerprints of the training questions, also of earlier runs; None: not recorded. exact_memory: return
        freed memory to the system after every phase, so that each is measured alone. style: the prompts' style;
        None: the one that config asks for.
        """
        check_card(ds.precision)
        if config.full_determinism:
            fix_workspaces()
        self.config, self.ds, self.world, self.console = config, ds, world, console
        self.progress = Progress(config.total_steps, dict(identity or {}))
        self.interruption = Interruption()
        self.profiler = Profiler(world.device, plan, exact=exact_memory)
        self.guard = Guard(world, self.profiler, self.interruption, shrink=self.shrink)
        self.bad_steps = NonfiniteSteps(config.max_bad_steps, world, console.line)
        self.trained_on = trained_on
        # The tokenizer that the run began with: the model's own may have changed since, with its chat template.
        base, trust = config.model if config.lora_r else None, config.trust_remote_code
        self.tokenizer = load_tokenizer(str(origin or config.model), base=base, trust_remote_code=trust)
        style = style or prompt_style(config)
        for line in style.check(self.tokenizer):  # before the model is loaded
            console.line(line)
        label_ids = label_ids_for(config, self.tokenizer, console.line)
        self.engine = self.make_engine(weights_of(config, origin))
        self.choose_rows()
        self.sampler = Sampler(
            self.engine.model,
            self.tokenizer,
            max_completion_length=config.max_completion_length,
            stop=config.answer_format.stop,
            label_ids=label_ids,
            cuda_graphs=config.cuda_graphs,
            poll=self.guard.poll,
        )
        self.collector = Collector(config, world, self.sampler, style, reward_functions, lambda: self.progress, console)
        self.folder: Path | None = None  # of the run
        self.reference: Reference | None = None
        self.partial_step: PartialStep | None = None  # a rollout whose mu updates are not all done
        self.completions: list[dict[str, Any]] = []  # the last step's on this rank, for the logs
        self.limits = Limits.of(config)
        self.apply_limits()

    def make_engine(self, weights: str) -> Engine:
        """Load the policy from `weights`, a folder or a model's name; an adapter's state comes with the engine's."""
        config, ds, source = self.config, self.ds, replace(self.config, model=weights)
        dtype = DTYPES[ds.precision]
        policy = self.guard.run("load", trainable_policy, source, dtype=dtype, known_ids=len(self.tokenizer))
        seed, deterministic = seed_at(config.seed, 0, self.world.rank), config.full_determinism
        return self.guard.run("initialise", Engine, policy, ds, seed=seed, deterministic=deterministic)

    # --- the loop ---------------------------------------------------------------------------------------------

    def steps(self, questions: list[Question]) -> Iterator[dict[str, float]]:
        """Yield the metrics of each of num_iterations x num_steps steps that is not done yet."""
        for step in range(self.progress.global_step, self.config.total_steps):
            self.refresh_reference(step, questions)
            yield self.step(step, questions)

    def step(self, step: int, questions: list[Question]) -> dict[str, float]:
        """One rollout and its mu updates; returns the step's metrics over all ranks."""
        first_span = len(self.profiler.spans)  # the step's spans give its seconds and peaks
        self.progress.first_weights = self.progress.first_weights or as_hex(sampled_weights(self.engine.policy))
        if self.partial_step is None:
            groups, redrawn = self.guard.run("sample", self.collector.collect, step, questions)
            rollout = self.guard.run("reference", self.make_rollout, groups)
            self.partial_step = PartialStep(rollout, redrawn)
        partial = self.partial_step
        self.keep_completions(step, partial)
        while partial.updates < self.config.mu:
            updated = self.guard.run("update", self.update, partial)
            self.check_numbers(step, partial, updated)
            partial.record(updated.tally, updated.logprobs)
            if partial.updates < self.config.mu:
                self.guard.safe_point()
        self.partial_step = None
        return self.finish_step(step, partial, questions, first_span)

    def make_rollout(self, groups: Groups) -> Rollout:
        """Add advantages and reference log-probs to sampled groups."""
        return make_rollout(
            replace(groups, prompts=self.row_prompts(groups.prompts)),
            self.world,
            scale_rewards=self.config.scale_rewards,
            mask_truncated=self.config.mask_truncated_completions,
            reference=self.reference,
            pack_tokens=self.limits.tokens,
            expected_reward=self.collector.expected_reward,
            aggregation=self.config.multi_objective_aggregation,
            reward_weights=self.collector.reward_weights,
        )

    def update(self, partial: PartialStep) -> Updated:
        """Take one optimizer step on a rollout, or none if a number is not finite."""
        what = f"Step {self.progress.global_step + 1} of {self.config.total_steps}, update"
        with self.console.progress(what, len(partial.rollout.texts) * self.world.size, "completions") as advance:
            return update(
                self.engine,
                partial.rollout,
                self.profiler,
                old_logprobs=partial.old_logprobs,
                pack_tokens=self.limits.tokens,
                world=self.world,
                objective=self.config.objective,
                advance=advance,
            )

    def check_numbers(self, step: int, partial: PartialStep, updated: Updated) -> None:
        """Report a skipped update. Raises NumbersError if --max_bad_steps is exceeded.

        An overflow of fp16 is not a bad step, nor is it a good one that would end a row of them.
        """
        if updated.overflow:
            scale = self.engine.loss_scale.value
            return self.console.line(
                f"Step {step + 1} is skipped: its gradient overflows fp16. Loss scale now {scale:g}."
            )
        old, new = partial.old_logprobs, updated.logprobs
        self.bad_steps.record_step(updated.bad, step, partial.rollout, old=old, policy=new)

    def finish_step(
        self, step: int, done: PartialStep, questions: Sequence[Question], first_span: int
    ) -> dict[str, float]:
        """Advance the progress and return the metrics to log."""
        progress, config = self.progress, self.config
        questions_per_step = config.batch_size * self.world.size
        progress.num_input_tokens_seen += sum(self.world.gather(done.rollout.tokens()))
        progress.global_step, progress.epoch = step + 1, (step + 1) * questions_per_step / len(questions)
        floor = {} if progress.kl_floor is None else {"kl_floor": progress.kl_floor}
        metrics = {
            **step_metrics(config, done, self.world, self.profiler, first_span),
            **floor,
            "num_tokens": progress.num_input_tokens_seen,
            "epoch": progress.epoch,
            "learning_rate": self.engine.learning_rate,
            "weights_moved": share_moved(progress.first_weights, sampled_weights(self.engine.policy)),
        }
        if warning := flat_rewards([*progress.log_history, metrics], done.rollout, config.answer_format):
            self.console.line(warning)
        return metrics

    def count_changed_weights(self) -> None:
        """Count them before they are saved: all are read, and each is compared with the files of the start."""
        progress, name = self.progress, self.config.model
        progress.weights_changed = share_changed(self.engine.model, name, progress.first_weights)

    def keep_completions(self, step: int, partial: PartialStep) -> None:
        """Keep the step's completions for the log; print those of the first step."""
        self.completions = partial.rollout.table(self.config.answer_format)
        if step == 0 and not partial.updates:
            self.console.samples(self.completions)

    # --- limits of memory -------------------------------------------------------------------------------------

    def shrink(self, phase: str) -> bool:
        """With --oom_retry, halve the limit that makes `phase` large; False if none can be halved."""
        if not self.config.oom_retry or not self.ds.zero_stage or (smaller := self.limits.halve(phase)) is None:
            return False
        self.console.line(f"Out of memory in phase {phase}: continuing with {smaller}.")
        if phase == "update":
            self.engine.abandon()
        self.apply_limits()
        return True

    def apply_limits(self) -> None:
        """Hand the limits to the sampler and to the models."""
        self.sampler.rows_at_once = self.limits.rows
        for model in (self.engine.policy, *([self.reference.model] if self.reference else [])):
            model.options["chunk_mib"] = self.limits.chunk_mib

    def choose_rows(self) -> None:
        """Use packed rows if the model's attention can take their mask, else one row for each completion."""
        longest = self.config.max_prompt_length + self.config.max_completion_length
        if reason := why_not_packed(self.engine.policy, longest=longest):
            self.engine.policy.packs = False
            self.console.line(f"Padded rows, which repeat each prompt: this model cannot take packed rows ({reason}).")

    def row_prompts(self, prompts: list[Tensor]) -> list[Tensor]:
        """Repeat each prompt for its rows: one row for a group if the model packs, else one for each completion."""
        size = 1 if self.engine.policy.packs else self.config.num_generations
        return [prompt for prompt in prompts for _ in range(size)]

    # --- the reference ----------------------------------------------------------------------------------------

    def refresh_reference(self, step: int, questions: list[Question]) -> None:
        """Make a new reference at the start of an iteration, or move it towards the policy (the outer loop)."""
        if self.progress.reference_step == step:
            return  # resumed within this step
        if step % self.config.num_steps == 0:
            self.make_reference(questions)
        elif self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            self.sync_reference(questions)
        self.progress.reference_step = step

    def make_reference(self, questions: list[Question]) -> None:
        """Freeze a copy of the current policy, and measure the KL at which training starts."""
        kind = self.config.reference_kind
        if not self.config.beta:
            return
        policy, name, step = self.engine.policy, self.config.model, self.progress.global_step
        copy = self.folder and self.folder / f"reference-{step}"
        self.reference = self.progress.reference_step = None  # frees the old copy first; a checkpoint now has none
        with self.profiler.phase("reference"):  # not by the guard: smaller limits make no smaller copy
            self.reference = make_reference(policy, kind, partial(store_weights, policy, name, copy, self.world))
        floor = self.progress.kl_floor = self.guard.run("floor", self.measure_floor, self.reference, questions)
        self.console.reference(kind, self.reference.bytes(), floor)

    def sync_reference(self, questions: list[Question]) -> None:
        """Move the reference towards the policy, as in TRL; with alpha 1 or without a reference make a new one."""
        alpha = self.config.ref_model_mixup_alpha
        if alpha == 1 or self.reference is None:
            return self.make_reference(questions)
        self.guard.run("sync", self.reference.mix, self.engine.policy, alpha)

    def measure_floor(self, reference: Reference, questions: list[Question]) -> float:
        """Mean k3 per token between policy and reference, over completions of the first step's questions."""
        tally = Tally()
        for rows, _ in self.collector.first_completions(questions):
            tally.add("floor", kl_floor(self.engine.policy, reference, rows))
        return tally.means(self.world.sum(tally.as_tensor()))["floor"]

    # --- before and around the loop ---------------------------------------------------------------------------

    def preflight(self) -> None:
        """Test the assumptions of training before the first step; changes nothing."""
        objective, tokens = self.config.objective, self.limits.tokens
        self.guard.run(
            "preflight", preflight, self.engine, self.sampler, self.world, objective=objective, pack_tokens=tokens
        )
        self.console.line("Preflight passed: gradients, log-probs, first ratio, EOS and sampling are correct.")

    def evaluate(self, when: str, questions: Sequence[Question], *, briefly: bool = False) -> Evaluation:
        """Answer and grade the held-out questions. when: a heading such as "Before training".

        briefly: without --eval_samples and --eval_misled.
        """
        what = f"Evaluation {when[0].lower()}{when[1:]}"
        with self.console.progress(what, len(questions), announce=True) as advance:
            result = evaluate(
                self.sampler,
                self.collector.style,
                questions,
                self.world,
                samples=0 if briefly else self.config.eval_samples,
                misled=self.config.eval_misled and not briefly,
                advance=advance,
                run=self.guard.run,
            )
        if self.config.answers == "none":
            result = result.rewarded(self.held_out_rewards(result.texts, questions))
        self.console.grades(when, result)
        return result

    def held_out_rewards(self, texts: Sequence[str], questions: Sequence[Question]) -> Rewards:
        """Score the answers on the first rank, so that a reward function sees each once."""

        def score() -> Rewards | None:
            return self.collector.held_out_rewards(texts, questions) if self.world.is_first else None

        rewards = self.world.gather(self.guard.run("evaluate", score))[0]
        self.collector.warn_of_failures(rewards)
        return rewards

    def use_folder(self, folder: Path) -> None:
        """Set the run's folder: for bad_batch.json if numbers stay not finite, and for weights to stream."""
        self.folder = self.bad_steps.folder = folder

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state. Weights and optimizer are not in it: Engine.save_checkpoint writes them.

        Example:
            {"progress": Progress(global_step=50, ...), "partial_step": None, "reference": {"model.lm_head.codes": ...}}
        """
        progress = replace(
            self.progress, limits=self.limits.lowered(self.config), bad_steps=list(self.bad_steps.in_a_row)
        )
        reference = self.reference.state() if self.reference else None
        return {"progress": progress, "partial_step": self.partial_step, "reference": reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`; every rank calls it, after Engine.load_checkpoint."""
        inputs, self.progress = self.progress.identity, replace(state["progress"], max_steps=self.config.total_steps)
        self.progress.continue_with(inputs)
        self.bad_steps.in_a_row = list(self.progress.bad_steps)
        self.partial_step = state["partial_step"]
        if state["reference"] is not None:
            kind = self.config.reference_kind
            self.reference = restore_reference(self.engine.policy, kind, state["reference"], run=state["run"])
        self.limits.lower_to(self.progress.limits)
        self.apply_limits()
