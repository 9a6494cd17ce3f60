"""The questions of a step, asked: completions sampled and rewarded on this rank."""

from collections.abc import Sequence
from functools import partial

from grpo_ds.settings.config import TrainConfig
from grpo_ds.system.ranks import World
from grpo_ds.task.questions import Question, questions_at
from grpo_ds.task.rewards import WeightedFunctions
from grpo_ds.task.scoring import score
from grpo_ds.training.dynamic_sampling import draw_groups
from grpo_ds.training.rollout import Groups, PromptStyle, reward, sample
from grpo_ds.training.sampling import Sampler, seed_at

NO_RANK = -1  # in a seed of a whole attempt: no rank's own draw has it


class Collector:
    """What it collects is a function of the policy and (seed, step, rank, attempt): it has no state to save."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        sampler: Sampler,
        style: PromptStyle,
        reward_functions: WeightedFunctions,
    ) -> None:
        self.config, self.world, self.sampler, self.style = config, world, sampler, style
        self.score = partial(
            score, functions=reward_functions, timeout=config.reward_timeout, on_error=config.on_reward_error
        )

    def collect(self, step: int, questions: list[Question]) -> tuple[Groups, int]:
        """batch_size groups of a step, and how many were asked anew by --dynamic_sampling."""
        config = self.config
        draw = partial(self.draw, step, questions)
        return draw_groups(draw, count=config.batch_size, attempts=config.dynamic_sampling)

    def draw(self, step: int, questions: list[Question], attempt: int, places: Sequence[int]) -> Groups:
        """A group for each of these places of the step; later attempts ask other questions there."""
        config = self.config
        seed = seed_at(config.seed, attempt, NO_RANK) if attempt else config.seed
        here = self.questions_of(step, questions, seed)
        asked = [here[place] for place in places]
        prompts, completions = sample(
            self.sampler,
            self.style,
            asked,
            group_size=config.num_generations,
            temperature=config.temperature,
            seed=seed_at(seed, step, self.world.rank),
        )
        texts = self.style.texts(self.sampler.tokenizer, completions)
        rewards = reward(
            texts,
            asked,
            completions,
            score=self.score,
            max_completion_length=config.max_completion_length,
            overlong_buffer=config.overlong_buffer,
            overlong_penalty=config.overlong_penalty,
        )
        return Groups(asked, prompts, completions, texts, rewards)

    def questions_of(self, step: int, questions: list[Question], seed: int) -> list[Question]:
        """This rank's share of the step's questions."""
        size, first = self.config.batch_size, self.world.rank * self.config.batch_size
        balanced = self.config.balance_classes
        asked = questions_at(step, questions, per_step=size * self.world.size, seed=seed, balanced=balanced)
        return asked[first : first + size]
