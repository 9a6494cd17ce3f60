"""Collect the groups of a step: ask questions, sample completions and compute rewards, on this rank.

Dynamic sampling: a group whose rewards are all equal teaches nothing, so another question is asked in its place.
Source: DAPO (Yu et al. 2025), section 3.2 and eq. 11; bounded here, so that a step always ends.
Each rank draws alone, as often as it needs; the number of its groups does not change.

Q questions, G completions each, B = Q * G.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerState

from grpo_ds.core.advantages import overlong
from grpo_ds.core.expected_reward import LabelProbs
from grpo_ds.core.objective import AnswerReward
from grpo_ds.report.console import Console
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system.ranks import World
from grpo_ds.task.questions import Question, questions_at
from grpo_ds.task.rewards import CORRECTNESS, OVERLONG, REASONING_GAIN, OwnReward, WeightedFunctions
from grpo_ds.task.scoring import Rewards, Sampled, joined, score
from grpo_ds.training.draws import seed_at
from grpo_ds.training.label_tokens import label_probs
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.rollout import Groups, MicroBatch, micro_batches
from grpo_ds.training.sampling import Completions, Sampler

NO_RANK = -1  # stands for all ranks in the seed of a later attempt; no rank's own draw has it
Draw = Callable[[int, Sequence[int]], Groups]  # (attempt, places in the step) -> one group for each place
Item = TypeVar("Item")


class Collector:
    """Collects the groups of a step, as a function of the policy and (seed, step, rank, attempt): no state is saved."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        sampler: Sampler,
        style: PromptStyle,
        reward_functions: WeightedFunctions,
        progress: Callable[[], Progress],
        console: Console,
    ) -> None:
        """progress: returns the run's, for reward functions. console: shows how far sampling is, and warnings."""
        self.config, self.world, self.sampler, self.style = config, world, sampler, style
        self.score = partial(
            score, functions=reward_functions, timeout=config.reward_timeout, on_error=config.on_reward_error
        )
        self.expected_reward = expected_reward(config, reward_functions) if sampler.label_ids else 0.0
        weights = {name: weight for name, (_, weight) in reward_functions.items()}
        self.reward_weights = {**weights, OVERLONG: config.overlong_penalty}
        self.gain_weight = reward_functions[REASONING_GAIN][1] if REASONING_GAIN in reward_functions else 0.0
        self.needs_sampling = any(isinstance(f, OwnReward) and f.needs_sampling for f, _ in reward_functions.values())
        self.progress, self.console = progress, console
        self._warned: set[str] = set()  # names of reward functions

    def collect(self, step: int, questions: list[Question]) -> tuple[Groups, int]:
        """Return batch_size groups, and how many groups --dynamic_sampling exchanged for them."""
        draw = partial(self.draw, step, questions)
        by_name = self.config.multi_objective_aggregation == "normalize_then_sum"
        groups, exchanged = draw_groups(
            draw, count=self.config.batch_size, attempts=self.config.dynamic_sampling, by_name=by_name
        )
        self.warn_of_failures(groups.rewards)
        return groups, exchanged

    def draw(self, step: int, questions: list[Question], attempt: int, places: Sequence[int]) -> Groups:
        """Draw a group for each of these places in the step; later attempts ask other questions."""
        config = self.config
        seed = seed_at(config.seed, attempt, NO_RANK) if attempt else config.seed
        here = self.rank_questions(step, questions, seed)
        asked = [here[place] for place in places]
        what = f"Step {step + 1} of {config.total_steps}, {f'redraw {attempt}' if attempt else 'sampling'}"
        tokenizer, size = self.sampler.tokenizer, config.num_generations
        unreasoned = [self.style.up_to_answer(tokenizer, "")] if self.gain_weight else []
        prompts, completions = self.sample(
            what, asked, group_size=size, seed=seed_at(seed, step, self.world.rank), forced=unreasoned
        )
        texts = self.style.texts(tokenizer, completions)
        ids = lambda: [row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)]  # noqa: E731
        repeated = [question for question in asked for _ in range(size)]
        rewards = self.rewards(texts, repeated, ids)
        labels = self.label_probs(completions, texts, repeated)
        if labels and self.expected_reward:
            rewards = with_expected_answers(rewards, labels, self.expected_reward)
        if labels and self.gain_weight and completions.forced_logprobs is not None:
            gains = reasoning_gains(labels, completions.forced_logprobs[:, 0])
            rewards = rewards.replaced(REASONING_GAIN, [gain and self.gain_weight * gain for gain in gains])
        return Groups(asked, prompts, completions, texts, self.with_overlong_penalty(rewards, completions), labels)

    def label_probs(
        self, completions: Completions, texts: Sequence[str], questions: Sequence[Question]
    ) -> LabelProbs | None:
        """Probabilities of the labels where each completion answers. questions: [B]."""
        right, tokenizer = [question.label for question in questions], self.sampler.tokenizer
        return label_probs(completions, texts, right, tokenizer, self.style.answer_format, self.sampler.label_ids)

    def sample(
        self, what: str, questions: list[Question], *, group_size: int, seed: int, forced: Sequence[Sequence[int]] = ()
    ) -> tuple[list[Tensor], Completions]:
        """Return the prompt of each question as a tensor of ids, and group_size completions of it, drawn by `seed`.

        what: name of the work where its progress is shown. forced: of the sampler.
        """
        prompts = self.style.encode(self.sampler.tokenizer, questions)
        config, total = self.config, len(prompts) * group_size * self.world.size
        most = total * config.max_completion_length
        with self.console.progress(what, total, "completions", most_tokens=most) as advance:
            options: dict[str, Any] = {"temperature": config.temperature, "seed": seed, "advance": advance}
            completions = self.sampler(prompts, group_size=group_size, forced=forced, **options)
        return [torch.tensor(prompt, device=completions.ids.device) for prompt in prompts], completions

    def rewards(
        self, texts: Sequence[str], questions: Sequence[Question], ids: Callable[[], list[list[int]]], **options: Any
    ) -> Rewards:
        """Score B completions. questions: [B]. ids: returns those of the completions. options: of `score`."""
        sampled = None
        if self.needs_sampling:
            prompts = self.style.shown(self.sampler.tokenizer, questions)
            sampled = Sampled(prompts, ids(), TrainerState(**self.progress().shared()))
        return self.score(texts, questions, sampled=sampled, **options)

    def held_out_rewards(self, texts: Sequence[str], questions: Sequence[Question]) -> Rewards:
        """Score one text for each question, in calls of the size of training: --reward_timeout is set for that number.

        A function that fails counts as one that does not apply.
        """
        size, encode = self.config.batch_size * self.config.num_generations, self.sampler.tokenizer.encode

        def scored(part: slice) -> Rewards:
            ids = lambda: [encode(text, add_special_tokens=False) for text in texts[part]]  # noqa: E731
            return self.rewards(texts[part], list(questions[part]), ids, on_error="zero")

        return joined([scored(slice(start, start + size)) for start in range(0, len(texts), size)])

    def rank_questions(self, step: int, questions: list[Question], seed: int) -> list[Question]:
        """Questions of the step (questions_at) that this rank asks."""
        size, first = self.config.batch_size, self.world.rank * self.config.batch_size
        balanced = self.config.balance_classes and self.config.answer_format.is_closed
        asked = questions_at(step, questions, per_step=size * self.world.size, seed=seed, balanced=balanced)
        return asked[first : first + size]

    def first_completions(self, questions: list[Question]) -> list[MicroBatch]:
        """Packed rows with one completion of each question that this rank asks in the first step."""
        asked = self.rank_questions(0, questions, self.config.seed)
        return micro_batches(*self.sample("KL floor, sampling", asked, group_size=1, seed=self.config.seed))

    def warn_of_failures(self, rewards: Rewards) -> None:
        """Report the first failure of each reward function that --on_reward_error zero ignored."""
        for name, error in rewards.errors.items():
            if name not in self._warned:
                self.console.line(
                    f"Warning: {error}\nThis batch is scored without it; reward_errors counts later failures."
                )
                self._warned.add(name)

    def with_overlong_penalty(self, rewards: Rewards, completions: Completions) -> Rewards:
        """Subtract the penalty of completions that reach into --overlong_buffer, as a separate reward."""
        config = self.config
        if not config.overlong_buffer:
            return rewards
        share = overlong(completions.lengths(), max_length=config.max_completion_length, buffer=config.overlong_buffer)
        return rewards.plus(OVERLONG, (share * config.overlong_penalty).tolist())


def expected_reward(config: TrainConfig, functions: WeightedFunctions) -> float:
    """Reward for a right answer, weight applied, of which the expectation is taken over the labels; 0 if it is drawn.

    GDPO divides the rewards of drawn answers by their deviation, so auto draws them there.
    """
    decoupled = config.multi_objective_aggregation == "normalize_then_sum"
    if config.answer_reward == "sampled" or (config.answer_reward == "auto" and decoupled):
        return 0.0
    if config.answer_reward in ("auto", "expected"):
        return config.correctness_reward * functions[CORRECTNESS][1] if CORRECTNESS in functions else 0.0
    raise ValueError(
        f"answer_reward is {config.answer_reward!r}; it must be one of {', '.join(get_args(AnswerReward))}."
    )


def with_expected_answers(rewards: Rewards, labels: LabelProbs, reward: float) -> Rewards:
    """Replace the reward of each drawn answer by its expectation, where the labels' probabilities are known."""
    drawn, q, placed = rewards.by_name[CORRECTNESS], labels.p_right.tolist(), labels.placed.tolist()
    expected = [reward * p if known else value for value, p, known in zip(drawn, q, placed, strict=True)]
    return rewards.replaced(CORRECTNESS, expected)


def reasoning_gains(labels: LabelProbs, unreasoned: Float[Tensor, "B n"]) -> list[float | None]:
    """Return how much likelier each reasoning makes the right label; None for a completion without a place.

    unreasoned: log-probs of the labels behind an empty reasoning.
    """
    without = unreasoned.exp().gather(1, labels.right[:, None]).squeeze(1)
    gains, placed = (labels.p_right - without).tolist(), labels.placed.tolist()
    return [gain if known else None for gain, known in zip(gains, placed, strict=True)]


def draw_groups(draw: Draw, *, count: int, attempts: int, by_name: bool = False) -> tuple[Groups, int]:
    """Return `count` groups and how many were exchanged: attempt 0 draws all, later attempts redraw
    groups of equal rewards. by_name: of every function."""
    groups, exchanged = draw(0, range(count)), 0
    for attempt in range(1, attempts + 1):
        places = groups.without_spread(by_name=by_name)
        if not places:
            break
        groups = exchange(groups, places, draw(attempt, places))
        exchanged += len(places)
    return groups, exchanged


def exchange(groups: Groups, places: Sequence[int], fresh: Groups) -> Groups:
    """Return `groups` with those at `places` replaced by the groups of `fresh`, in order."""
    count, size = len(groups.questions), groups.group_size
    fresh_at = {place: count + number for number, place in enumerate(places)}
    order = [fresh_at.get(place, place) for place in range(count)]
    rows = [place * size + row for place in order for row in range(size)]
    return Groups(
        _pick(groups.questions, fresh.questions, order),
        _pick(groups.prompts, fresh.prompts, order),
        _pick_rows(groups.completions, fresh.completions, rows),
        _pick(groups.texts, fresh.texts, rows),
        joined([groups.rewards, fresh.rewards]).rows(rows),
        groups.labels and fresh.labels and groups.labels.exchanged(fresh.labels, rows),
    )


def _pick(first: Sequence[Item], second: Sequence[Item], order: Sequence[int]) -> list[Item]:
    both = [*first, *second]
    return [both[i] for i in order]


def _pick_rows(first: Completions, second: Completions, rows: Sequence[int]) -> Completions:
    mask = _stacked(first.mask, second.mask)[rows]
    width = int(mask.sum(dim=1).max())  # the longest completion may have been replaced
    ids = _stacked(first.ids, second.ids)[rows]
    return Completions(ids[:, :width], mask[:, :width], torch.cat([first.ended, second.ended])[rows])


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Stack the rows of both; the narrower tensor is padded with 0, which the mask hides."""
    width = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in (first, second)])
