"""The run: evaluate, train by GRPO, evaluate again, save.

`Trainer.train` reads like Algorithm 1 of DeepSeekMath (Shao et al. 2024): an outer loop that remakes the
reference from the policy, a middle loop that samples, and mu updates on every sample.
"""

import hashlib
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from grpo_ds.config import TrainConfig, write_config
from grpo_ds.core.tally import Tally
from grpo_ds.ds_config import DsConfig
from grpo_ds.engine import Engine
from grpo_ds.evaluation import Evaluation, evaluate
from grpo_ds.inference import prompt_style
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.reference import Reference, kl_floor
from grpo_ds.report.console import Console
from grpo_ds.report.trackers import make_trackers
from grpo_ds.rollouts import Rollout, judge, micro_batches, sample
from grpo_ds.sampling import Sampler
from grpo_ds.task.questions import Question, questions_at
from grpo_ds.task.rewards import RewardFunction
from grpo_ds.update import backwards_per_step, update
from grpo_ds.world import World


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


class Trainer:
    """A policy, its engine and everything a step needs."""

    def __init__(
        self,
        config: TrainConfig,
        ds: DsConfig,
        world: World,
        console: Console,
        reward_functions: Mapping[str, tuple[RewardFunction, float]],
    ) -> None:
        self.config, self.ds, self.world, self.console = config, ds, world, console
        self.reward_functions = reward_functions
        self.tokenizer = load_tokenizer(config.model)
        self.style = prompt_style(config)
        dtype = torch.bfloat16 if ds.bf16 else torch.float32
        model = load_policy(config.model, dtype=dtype, checkpointing=config.gradient_checkpointing)
        known_ids = min(len(self.tokenizer), model.get_output_embeddings().weight.shape[0])
        policy = LogprobModel(
            model, vocab_size=known_ids, temperature=config.temperature, chunk_mib=config.logprob_chunk_mib
        )
        backwards = backwards_per_step(config.batch_size, config.micro_groups)
        seed = seed_at(config.seed, 0, world.rank)
        self.engine = Engine(policy, ds, backwards_per_step=backwards, seed=seed)
        self.sampler = Sampler(model, self.tokenizer, max_completion_length=config.max_completion_length)
        self.reference: Reference | None = None
        self.seconds: dict[str, float] = {}

    def run(self, train: list[Question], held_out: list[Question], folder: Path) -> Outcome:
        """The whole of it; rank 0 writes into `folder`."""
        self.style.encode(self.tokenizer, [*train, *held_out])  # a question too long for its budget stops us here
        before = self.evaluate("Before training", held_out)
        if self.world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, folder)
        rewards = self.train(train, folder)
        after = self.evaluate("After training", held_out)
        self.save(folder)
        return Outcome(rewards, before, after)

    def train(self, questions: list[Question], folder: Path) -> list[float]:
        """num_iterations x num_steps rollouts; returns the mean reward of each."""
        config, rewards = self.config, []
        trackers = make_trackers(config.report_to, folder, asdict(config)) if self.world.is_first else []
        started = time.monotonic()
        with self.console.progress("Training", config.total_steps) as advance:
            for step in range(config.total_steps):
                if step % config.num_steps == 0:
                    self.make_reference(questions)
                metrics = self.step(step, questions)
                rewards.append(metrics["reward"])
                for tracker in trackers:
                    tracker.log(metrics, step=step + 1)
                left = (time.monotonic() - started) / (step + 1) * (config.total_steps - step - 1)
                self.console.step(metrics, step=step + 1, total=config.total_steps, seconds_left=left)
                advance(1)
        for tracker in trackers:
            tracker.finish({"reward_first": rewards[0], "reward_last": rewards[-1]})
        return rewards

    def step(self, step: int, questions: list[Question]) -> dict[str, float]:
        """Sample, score, update; the step's metrics over all ranks."""
        config = self.config
        self.seconds = {}
        asked = self.my_questions(step, questions)
        with self.phase("sample"):
            prompts, completions = sample(
                self.sampler,
                self.style,
                asked,
                group_size=config.num_generations,
                temperature=config.temperature,
                seed=seed_at(config.seed, step, self.world.rank),
            )
            texts = self.style.texts(self.tokenizer, completions)
        with self.phase("score"):
            rollout = judge(
                asked,
                prompts,
                completions,
                texts,
                reward_functions=self.reward_functions,
                reference=self.reference,
                micro_groups=config.micro_groups,
            )
        with self.phase("update"):
            tally = update(
                self.engine,
                rollout,
                mu=config.mu,
                micro_groups=config.micro_groups,
                ranks=self.world.size,
                epsilon=config.epsilon,
                beta=config.beta,
            )
        return self.metrics(rollout, tally)

    def my_questions(self, step: int, questions: list[Question]) -> list[Question]:
        """This rank's share of the step's questions; a function of (seed, step, rank), with no state to save."""
        size, first = self.config.batch_size, self.world.rank * self.config.batch_size
        asked = questions_at(step, questions, per_step=size * self.world.size, seed=self.config.seed)
        return asked[first : first + size]

    def make_reference(self, questions: list[Question]) -> None:
        """A frozen copy of the policy as it is now, and the KL it starts from."""
        if not self.config.beta:
            return
        self.reference = None  # the old one's memory goes before the new one comes
        self.reference = Reference(self.engine.policy, self.config.reference)
        floor = self.measure_floor(self.reference, questions)
        self.console.line(
            f"Reference: {self.config.reference}, {self.reference.bytes() / 2**20:.0f} MiB; its KL to the policy it "
            f"was made from is {floor:.4f} a token: the KL below starts there, not at 0."
        )

    def measure_floor(self, reference: Reference, questions: list[Question]) -> float:
        """Mean k3 between policy and reference over completions of the first step's questions."""
        config, asked = self.config, self.my_questions(0, questions)
        prompts, completions = sample(
            self.sampler, self.style, asked, group_size=1, temperature=config.temperature, seed=config.seed
        )
        tally = Tally()
        for rows, _ in micro_batches(prompts, completions):
            tally.add("floor", kl_floor(self.engine.policy, reference, rows))
        return tally.means(self.world.sum(tally.as_tensor()))["floor"]

    def evaluate(self, when: str, questions: list[Question]) -> Evaluation:
        with self.console.progress(when, len(questions)) as advance:
            result = evaluate(
                self.sampler,
                self.style,
                questions,
                self.world,
                batch_size=self.config.eval_batch_size,
                advance=advance,
            )
        grades = result.grades
        self.console.line(
            f"{when}: accuracy {grades.accuracy:.1%}, macro-F1 {grades.macro_f1:.3f}, well-formed "
            f"{grades.well_formed:.1%} of {grades.count} (always the commonest label: {grades.majority_baseline:.1%})"
        )
        return result

    def metrics(self, rollout: Rollout, tally: Tally) -> dict[str, float]:
        """The step over all ranks, as logged."""
        lengths = rollout.completions.lengths().double()
        count, spread = len(lengths), torch.tensor(rollout.rewards.total).view(len(rollout.questions), -1).std(dim=1)
        tally.add("reward", sum(rollout.rewards.total), count)
        tally.add_all({f"rewards/{name}": values for name, values in rollout.rewards.by_name.items()})
        tally.add("reward_std", spread.sum(), len(spread))
        tally.add("completion_length", lengths.sum(), count)
        tally.add("ended", rollout.completions.ended.sum(), count)
        for name, seconds in self.seconds.items():
            tally.add(f"seconds/{name}", seconds)
        means = tally.means(self.world.sum(tally.as_tensor()))
        tokens = means["completion_length"] * count * self.world.size
        seconds = sum(means[f"seconds/{name}"] for name in self.seconds)
        return {**means, "tokens_per_second": tokens / seconds, "learning_rate": self.engine.learning_rate, **memory()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds of a phase, the card's work included."""
        started = time.monotonic()
        yield
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.monotonic() - started

    def save(self, folder: Path) -> None:
        """The fine-tuned model as an ordinary transformers folder."""
        if self.world.is_first:
            self.engine.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.world.wait()


def seed_at(seed: int, step: int, rank: int) -> int:
    """Seeds that never meet: neighbouring steps and ranks share no draw, and no state has to be saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=4).digest())


def memory() -> dict[str, float]:
    """Peaks so far, in GiB."""
    peaks = {"memory/ram_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peaks["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks
