"""One call of each of the user's reward functions before a model is loaded: a mistake costs a second, not minutes.

The completions are made up, of every kind that a model writes: right, wrong, ill-formed, empty. They come in the groups
of a step, with the columns of the data's first records.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from math import ceil

from grpo_ds.errors import RewardError
from grpo_ds.system.fence import random_kept
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.own_rewards import columns_read
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import OwnReward, Prompt, WeightedFunctions
from grpo_ds.task.scoring import OnRewardError, Sampled, right_answers, score

KINDS = 4  # of made-up completions
TRIED = "This was the trial on made-up completions, before a model is loaded: nothing was written."


def try_rewards(
    functions: WeightedFunctions,
    questions: Sequence[Question],
    *,
    answer_format: AnswerFormat,
    batch_size: int,
    group_size: int,
    trainer_state: Callable[[], object],
    messages: Callable[[Question], list[dict[str, str]]],
    timeout: float = 0.0,
    on_error: OnRewardError = "stop",
) -> list[str]:
    """Call the user's functions once; return a warning for each that fails if on_error is "zero", [] if none does.

    batch_size: questions of a step, group_size: completions of each. trainer_state: makes one; called only if a
    function can read it. messages: the chat of a question. Random numbers are as before.
    Raises RewardError for a function that fails if on_error is "stop".
    """
    own = {name: it for name, it in functions.items() if isinstance(it[0], OwnReward)}
    if not own:
        return []
    asked = list(islice(cycle(questions), max(batch_size, ceil(KINDS / group_size))))
    repeated = [question for question in asked for _ in range(group_size)]
    texts = [made_up(question, answer_format)[i % KINDS] for i, question in enumerate(repeated)]
    sampled = None
    if any(it.needs_sampling for it, _ in own.values() if isinstance(it, OwnReward)):
        chats = {id(question): messages(question) for question in asked}
        prompts = [
            Prompt("\n\n".join(turn["content"] for turn in chats[id(question)]), chats[id(question)])
            for question in repeated
        ]
        state = trainer_state() if any(_may_read_state(it) for it, _ in own.values()) else None
        sampled = Sampled(prompts, [list(text.encode()) for text in texts], state)
    with random_kept():
        try:
            rewards = score(texts, repeated, functions=own, sampled=sampled, timeout=timeout, on_error=on_error)
        except RewardError as error:
            raise RewardError(f"{error}\n{TRIED}") from None
    return [f"Warning: {error}\n{TRIED}" for error in rewards.errors.values()]


def made_up(question: Question, answer_format: AnswerFormat) -> tuple[str, ...]:
    """Return completions to the question: right, wrong, ill-formed and empty; without a form ("none") four texts.

    Example:
        >>> made_up(Question("1", "Did it fall?", "", "yes"), AnswerFormat())[1]
        '<reasoning>A made-up completion.</reasoning><answer>no</answer>'
    """
    said, right = "A made-up completion.", next(iter(right_answers(question)), "")
    if answer_format.kind == "none":
        return f"{said} {right}".strip(), question.text, f"{said}\n" * 3, ""
    others = (label for label in answer_format.labels if label != right)
    wrong = {"labels": next(others, ""), "number": f"{right}1", "text": f"not {right}"}[answer_format.kind]
    return answer_format.write(said, right), answer_format.write(said, wrong), f"{said} It is {right}.", ""


def _may_read_state(function: Callable[..., object]) -> bool:
    read = columns_read(function.function) if isinstance(function, OwnReward) else frozenset[str]()
    return read is None or "trainer_state" in read
