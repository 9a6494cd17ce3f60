"""Reward functions in the shapes of TRL's documentation; tests/task/test_own_rewards.py says what each earns."""

import asyncio
import re
from functools import partial, wraps

import numpy as np

FORM = re.compile(r"<think>.+</think><answer>.+</answer>", re.DOTALL)


# --- completions as texts ---------------------------------------------------------------------------------------


def tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def boxed(completions, solution, **kwargs):
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [float(bool(match) and match[1] == right) for match, right in zip(found, solution, strict=True)]


def only_math(prompts, completions, task, **kwargs):
    parts = zip(prompts, completions, task, strict=True)
    return [float((prompt + completion).count("2")) if kind == "math" else None for prompt, completion, kind in parts]


def curriculum(completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


def logging(completions, log_extra, log_metric, **kwargs):
    log_extra("first", [completion[:1] for completion in completions])
    log_metric("share", 0.25)
    log_metric("share", 0.75)
    return [0.0] * len(completions)


def asks_a_judge(completions, **kwargs):
    """It reads "content", but of another model's reply."""
    reply = _judge([{"role": "user", "content": completion} for completion in completions])
    return [float(choice["message"]["content"]) for choice in reply["choices"]]


def _judge(messages):
    return {"choices": [{"message": {"role": "assistant", "content": str(len(it["content"]))}} for it in messages]}


def of_arrays(completions, **kwargs):
    return np.array([len(completion) for completion in completions]) > 15


def of_scalars(completions, **kwargs):
    return [np.float32(len(completion)) for completion in completions]


async def after_a_while(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [1.0 if completion else 0.0 for completion in completions]


class AsyncJudge:
    """A client that belongs to one event loop, as those of HTTP libraries do."""

    def __init__(self, worth=1.0):
        self.worth, self.loop = worth, None

    async def __call__(self, completions, **kwargs):
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        return await asyncio.gather(*(self.one(completion) for completion in completions))

    async def one(self, completion):
        await asyncio.sleep(0)
        return self.worth


judge = AsyncJudge(2.0)


class NeedsArguments:
    def __init__(self, worth):
        self.worth = worth

    def __call__(self, completions, **kwargs):
        return [self.worth] * len(completions)

    def method(self, completions, **kwargs):
        return self(completions)


needs_arguments = NeedsArguments(3.0)
bound = needs_arguments.method
short = lambda completions, **kwargs: [-1.0] * len(completions)  # noqa: E731


# --- completions as lists of messages ---------------------------------------------------------------------------


def has_form(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [float(bool(FORM.match(content))) for content in contents]


def in_a_loop(completions, **kwargs):
    rewards = []
    for number, completion in enumerate(completions):
        for message in completion:
            if message["role"] == "assistant":
                rewards.append(float(number + len(message.get("content"))))
    return rewards


def swallows(completions, **kwargs):
    """Given texts, it would earn 0 for each without a word."""
    rewards = []
    for completion in completions:
        try:
            rewards.append(float(len(completion[-1]["content"])))
        except Exception:
            rewards.append(0.0)
    return rewards


def last_turn(prompts, completions, **kwargs):
    return [float(len(prompt[-1]["content"])) for prompt in prompts]


def by_annotation(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    return [float(len(list(completion))) for completion in completions]


def _text(completion):
    return completion[0]["content"]


def with_a_helper(completions, **kwargs):
    return [float(len(_text(completion))) for completion in completions]


def with_map(completions, **kwargs):
    return [float(len(text)) for text in map(_text, completions)]


def with_a_lambda(completions, **kwargs):
    return list(map(lambda completion: float(len(completion[0]["content"])), completions))


def from_kwargs(**kwargs):
    return [float(len(completion[0]["content"])) for completion in kwargs["completions"]]


def _scaled(completions, factor, **kwargs):
    return [factor * len(completion[0]["content"]) for completion in completions]


halved = partial(_scaled, factor=0.5)


def _logged(function):
    @wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


@_logged
def decorated(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


class Messages:
    def __call__(self, completions, **kwargs):
        return [float(self.length(completion)) for completion in completions]

    def length(self, completion):
        return len(completion[0]["content"])


def matches(completions, **kwargs):
    rewards = []
    for completion in completions:
        match completion:
            case [{"content": text}]:
                rewards.append(float(len(text)))
            case _:
                rewards.append(-1.0)
    return rewards


async def yields(completions, **kwargs):
    yield 1.0


async def awaited_messages(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(completion[0]["content"])) for completion in completions]


def makes_a_reward(worth=4.0):
    def reward(completions, **kwargs):
        return [worth * len(completion) for completion in completions]  # one message

    return reward
