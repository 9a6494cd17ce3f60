"""The trainer: a policy, its engine, and the steps of GRPO.

`Trainer.steps` reads like Algorithm 1 of DeepSeekMath (Shao et al. 2024): an outer loop that remakes the
reference from the policy, a middle loop that samples, and mu updates on every sample. What surrounds the steps
(evaluation, logging, checkpoints, signals) is run.py's.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from grpo_ds.core.packing import PackedRows
from grpo_ds.core.tally import Tally
from grpo_ds.memory.limits import Limits
from grpo_ds.memory.phases import OutOfMemory, Profiler
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.models.logprob_model import why_not_packed
from grpo_ds.models.policy import load_tokenizer, trainable_policy
from grpo_ds.models.reference import Reference, kl_floor, make_reference
from grpo_ds.report.console import Console
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.system.ranks import World
from grpo_ds.system.signals import Interruption, Stopping
from grpo_ds.task.grading import Evaluation
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import WeightedFunctions
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.collect import Collector
from grpo_ds.training.engine import Engine
from grpo_ds.training.evaluate import evaluate
from grpo_ds.training.inference import prompt_style
from grpo_ds.training.nonfinite import NonfiniteSteps
from grpo_ds.training.preflight import preflight
from grpo_ds.training.rollout import PartialStep, Rollout, judge, micro_batches, sample
from grpo_ds.training.sampling import Sampler, seed_at
from grpo_ds.training.update import update

Result = TypeVar("Result")
RARE_ID = 100  # of a rehearsal's prompts: any token will do


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
        weights: Path | None = None,
    ) -> None:
        """weights: a folder with the whole model to go on from, in place of config.model."""
        self.config, self.ds, self.world, self.console = config, ds, world, console
        self.progress = Progress(config.total_steps)
        self.interruption = Interruption()
        self.warned: set[str] = set()  # reward functions whose first failure was told
        self.bad_steps = NonfiniteSteps(config.max_bad_steps, world, console.line)
        self.profiler = Profiler(world.device, plan)
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        dtype = torch.bfloat16 if ds.bf16 else torch.float32
        source = replace(config, model=str(weights)) if weights else config
        with self.profiler.phase("load"):
            policy = trainable_policy(source, dtype=dtype, known_ids=len(self.tokenizer))
        seed = seed_at(config.seed, 0, world.rank)
        with self.profiler.phase("initialise"):
            self.engine = Engine(policy, ds, seed=seed)
        self.choose_rows()
        length, stop_at = config.max_completion_length, config.answer_format.stop
        self.sampler = Sampler(policy.model, self.tokenizer, max_completion_length=length, stop=stop_at)
        self.reference: Reference | None = None
        self.partial_step: PartialStep | None = None  # a rollout between two of its mu updates
        self.completions: list[dict[str, Any]] = []  # of the last step on this rank, for people
        self.sampler.cuda_graphs = config.cuda_graphs
        self.collector = Collector(config, world, self.sampler, prompt_style(config), reward_functions)
        self.limits = Limits.of(config)
        self.apply_limits()

    def steps(self, questions: list[Question]) -> Iterator[dict[str, float]]:
        """num_iterations x num_steps rollouts, from where the run stands; the metrics of each."""
        for step in range(self.progress.global_step, self.config.total_steps):
            self.refresh_reference(step, questions)
            if step == 0 and self.partial_step is None and self.config.dry_run_worst_case:
                self.rehearse()
            metrics = self.step(step, questions)
            self.progress.global_step = step + 1
            yield metrics

    def step(self, step: int, questions: list[Question]) -> dict[str, float]:
        """Sample, score, update; the step's metrics over all ranks."""
        first_span = len(self.profiler.spans)
        if self.partial_step is None:
            self.partial_step = self.rollout(step, questions)
        now = self.partial_step
        self.completions = now.rollout.table()
        if step == 0 and not now.updates:
            self.console.samples(self.completions)
        while now.updates < self.config.mu:
            now.count(*self.update(step, now.rollout, now.old_logprobs))
            if now.updates < self.config.mu:
                self.safe_point()
        if self.config.dynamic_sampling:
            now.tally.add("redrawn", now.redrawn)
        self.partial_step = None
        return self.metrics(now.rollout, now.tally, first_span)

    def rollout(self, step: int, questions: list[Question]) -> PartialStep:
        """Completions of the step's questions, their rewards, advantages and reference log-probs."""
        config = self.config
        groups, redrawn = self.together(lambda: self.attempt("sample", lambda: self.collector.collect(step, questions)))
        rollout = self.attempt(
            "reference",
            lambda: judge(
                replace(groups, prompts=self.row_prompts(groups.prompts)),
                self.world,
                scale_rewards=config.scale_rewards,
                mask_truncated=config.mask_truncated_completions,
                reference=self.reference,
                pack_tokens=self.limits.tokens,
            ),
        )
        self.warn(rollout.rewards)
        return PartialStep(rollout, redrawn)

    def together(self, run: Callable[[], Result]) -> Result:
        """`run`, in which no rank waits for another: what fails or stops one of them here stops all, with nothing half
        done. Raises Stopping where any was asked to stop."""
        self.sampler.poll = self.interruption.check
        try:
            noted = lambda: self.interruption.signum  # noqa: E731  asked after `run`, in which it may have come
            result, signum = self.world.run_on_all_ranks(lambda: _unless_stopping(run), signum=noted)
        finally:
            self.sampler.poll = lambda: None
        if signum:  # what all ranks know of: one that came since then waits for the next time
            self.interruption.signum = self.interruption.signum or signum
            raise Stopping
        return cast(Result, result)

    def safe_point(self) -> None:
        """Where a run that was asked to stop ends."""
        self.together(self.interruption.check)

    def warn(self, rewards: Rewards) -> None:
        """Tell each reward function's first failure that --on_reward_error zero passed over."""
        for name, error in rewards.errors.items():
            if name not in self.warned:
                self.console.line(
                    f"Warning: {error}\nThis batch goes without; later ones are counted as reward_errors."
                )
                self.warned.add(name)

    def update(self, step: int, rollout: Rollout, old_logprobs: Tensor | None) -> tuple[Tally, Tensor]:
        """One optimizer step, or none where a number was not finite."""
        done = self.attempt(
            "update",
            lambda: update(
                self.engine,
                rollout,
                self.profiler,
                old_logprobs=old_logprobs,
                pack_tokens=self.limits.tokens,
                world=self.world,
                objective=self.config.objective,
            ),
        )
        self.bad_steps.record_step(done.bad, step, rollout, old=old_logprobs, policy=done.logprobs)
        return done.tally, done.logprobs

    def preflight(self) -> None:
        """What would spoil the run is found before it; nothing is changed."""
        with self.profiler.phase("preflight"):
            objective, tokens = self.config.objective, self.limits.tokens
            preflight(self.engine, self.sampler, self.world, objective=objective, pack_tokens=tokens)
        self.console.line("Preflight: gradients, log-probs, first ratio, EOS and sampling are what they must be.")

    def attempt(self, phase: str, run: Callable[[], Result]) -> Result:
        """`run` as a phase; with --oom_retry again in smaller parts for as long as it runs out of memory."""
        while True:
            try:
                with self.profiler.phase(phase):
                    return run()
            except OutOfMemory as error:
                able = self.config.oom_retry and self.world.size == 1 and self.ds.zero_stage and error.phase == phase
                if not able or (smaller := self.limits.halve(phase)) is None:
                    raise
            # Here, and not in the handler: the error's traceback holds the tensors that filled the memory.
            self.console.line(f"Out of memory in phase {phase}: from now on {smaller}.")
            if phase == "update":
                self.engine.abandon()
            self.apply_limits()
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def apply_limits(self) -> None:
        self.sampler.rows_at_once = self.limits.rows
        for model in (self.engine.policy, *([self.reference.model] if self.reference else [])):
            model.options["chunk_mib"] = self.limits.chunk_mib

    @property
    def binding_memory(self) -> Where:
        return "gpu" if self.world.device.type == "cuda" else "host"

    def refresh_reference(self, step: int, questions: list[Question]) -> None:
        """The outer loop: a new reference for every iteration, or one that follows the policy."""
        if self.progress.reference_step == step:
            return  # resumed within this step
        if step % self.config.num_steps == 0:
            self.make_reference(questions)
        elif self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            self.sync_reference(questions)
        self.progress.reference_step = step

    def make_reference(self, questions: list[Question]) -> None:
        """A frozen copy of the policy as it is now, and the KL it starts from."""
        if not self.config.beta:
            return
        self.reference = self.progress.reference_step = None  # the old one's memory goes before the new one comes
        with self.profiler.phase("reference"):
            self.reference = make_reference(self.engine.policy, self.config.reference_kind)
        with self.profiler.phase("floor"):
            floor = self.progress.kl_floor = self.measure_floor(self.reference, questions)
        starts = "there, not at 0" if floor else "at 0"
        self.console.line(
            f"Reference: {self.config.reference_kind}, {self.reference.bytes() / 2**20:.0f} MiB; its KL to the policy "
            f"it was made from is {floor:.4f} a token: the KL below starts {starts}."
        )

    def sync_reference(self, questions: list[Question]) -> None:
        """TRL's sync_ref_model: the reference moves towards the policy, or with alpha 1 is remade from it."""
        alpha = self.config.ref_model_mixup_alpha
        if alpha == 1 or self.reference is None:
            return self.make_reference(questions)
        with self.profiler.phase("sync"):  # unlike a reference half made, one half mixed is of no use
            self.reference.mix(self.engine.policy, alpha)

    def choose_rows(self) -> None:
        """Packed rows wherever the model's attention can take their mask, else a row a completion."""
        longest = self.config.max_prompt_length + self.config.max_completion_length
        if reason := why_not_packed(self.engine.policy, longest=longest):
            self.engine.policy.packs = False
            self.console.line(f"Padded rows, which repeat each prompt: this model cannot take packed ones ({reason}).")

    def row_prompts(self, prompts: list[Tensor]) -> list[Tensor]:
        """The prompts of the rows to come: a row a group where the model packs, else a row a completion."""
        size = 1 if self.engine.policy.packs else self.config.num_generations
        return [prompt for prompt in prompts for _ in range(size)]

    def rehearse(self) -> None:
        """One step on the longest prompts with the longest completions, which changes nothing: what is to run out of
        memory does so now and not after an hour."""
        config = self.config
        prompts = [[RARE_ID] * config.max_prompt_length] * config.batch_size
        size, temperature = config.num_generations, config.temperature
        self.sampler.full_length = True
        completions = self.attempt("sample", lambda: self.sampler(prompts, group_size=size, temperature=temperature))
        self.sampler.full_length = False
        tensors = self.row_prompts([torch.tensor(prompt, device=completions.ids.device) for prompt in prompts])

        def packed() -> Iterator[PackedRows]:
            yield from (rows for rows, _ in micro_batches(tensors, completions, self.limits.tokens))

        if self.reference:
            reference = self.reference
            self.attempt("reference", lambda: [reference(rows) for rows in packed()])
        self.attempt("update", lambda: self.engine.rehearse(packed()))
        use = ", ".join(f"{u.phase} {u.peak(self.binding_memory) / GIB:.1f}" for u in self.profiler.uses().values())
        self.console.line(
            f"Worst case rehearsed: {config.max_prompt_length} + {config.max_completion_length} tokens; "
            f"GiB at the peak of each phase: {use}"
        )

    def measure_floor(self, reference: Reference, questions: list[Question]) -> float:
        """Mean k3 between policy and reference over completions of the first step's questions."""
        config, asked = self.config, self.collector.questions_of(0, questions, self.config.seed)
        prompts, completions = sample(
            self.sampler, self.collector.style, asked, group_size=1, temperature=config.temperature, seed=config.seed
        )
        tally = Tally()
        for rows, _ in micro_batches(prompts, completions):
            tally.add("floor", kl_floor(self.engine.policy, reference, rows))
        return tally.means(self.world.sum(tally.as_tensor()))["floor"]

    def evaluate(self, when: str, questions: Sequence[Question]) -> Evaluation:
        with self.console.progress(when, len(questions)) as advance, self.profiler.phase("evaluate"):
            result = evaluate(
                self.sampler,
                self.collector.style,
                questions,
                self.world,
                advance=advance,
                together=self.together,
            )
        grades = result.grades
        self.console.line(
            f"{when}: accuracy {grades.accuracy:.1%}, macro-F1 {grades.macro_f1:.3f}, well-formed "
            f"{grades.well_formed:.1%} of {grades.count} (always the commonest label: {grades.majority_baseline:.1%})"
        )
        return result

    def metrics(self, rollout: Rollout, tally: Tally, first_span: int) -> dict[str, float]:
        """The step over all ranks, as logged."""
        rollout.count_into(tally, self.config.answer_format)
        if self.config.on_reward_error == "zero":
            tally.add("reward_errors", len(rollout.rewards.errors) * self.world.size)  # of all ranks, not their mean
        uses = self.profiler.uses(first_span).values()
        for use in uses:
            tally.add(f"seconds/{use.phase}", use.seconds)
        means = tally.means(self.world.sum(tally.as_tensor()))
        tokens = means["completion_length"] * len(rollout.texts) * self.world.size
        seconds = sum(means[f"seconds/{use.phase}"] for use in uses)
        memory = {"memory/ram_gib": self.profiler.peak("host") / GIB}
        if self.world.device.type == "cuda":
            memory["memory/gpu_peak_gib"] = self.profiler.peak("gpu") / GIB
        floor = {} if self.progress.kl_floor is None else {"kl_floor": self.progress.kl_floor}
        return {
            **means,
            **floor,
            "tokens_per_second": tokens / seconds,
            "learning_rate": self.engine.learning_rate,
            **memory,
        }


def _unless_stopping(run: Callable[[], Result]) -> Result | None:
    try:
        return run()
    except Stopping:
        return None
