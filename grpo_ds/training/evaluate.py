"""Answer the held-out questions greedily, read off how probable each label was, and grade both.

The probabilities behind the model's own reasoning come with its greedy answer; those behind an empty reasoning take a
few tokens more of each prompt that is in the cache already. Neither changes the answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from grpo_ds.errors import UsageError
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.shapes import longer_than_made_for, shape_of
from grpo_ds.settings.config import AskConfig
from grpo_ds.system.hardware import Precision
from grpo_ds.system.ranks import World
from grpo_ds.task.answer_probs import AnswerProbs, wrong_label
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.training.label_tokens import label_tokens
from grpo_ds.training.precision import DTYPES, check_card
from grpo_ds.training.prompt_style import PromptStyle, prompt_style
from grpo_ds.training.sampling import Completions, Sampler

CLAIM = "The answer is {}."  # reasoning that says no more than a label


@dataclass(frozen=True, slots=True)
class Answered:
    """A question's greedy completion, the probabilities of its labels, and further sampled answers."""

    text: str
    probs: AnswerProbs | None  # None: no token tells the labels apart
    sampled: list[str | None]
    cut: bool  # the text has not ended by itself


def evaluate(
    sampler: Sampler,
    style: PromptStyle,
    questions: Sequence[Question],
    world: World,
    *,
    samples: int = 0,
    misled: bool = False,
    advance: Callable[[int, int], None] = lambda done, tokens: None,
    run: Callable[[str, Callable[[], list[Answered]]], list[Answered]] = lambda phase, work: work(),
) -> Evaluation:
    """Answer and grade the questions: every rank answers its share and returns the complete evaluation.

    samples: answers to sample for each question, at temperature 1. misled: also behind a reasoning that claims a
    wrong label. advance: called with the numbers of questions that this rank answered and of tokens drawn, since the
    last call. run: Guard.run, so that a signal can stop ranks while they answer.
    """

    def answer() -> list[Answered]:
        mine = questions[world.rank :: world.size]
        if not mine:
            return []
        return _answer(sampler, style, mine, samples=samples, misled=misled, seed=world.rank, advance=advance)

    shares = [iter(share) for share in world.gather(run("evaluate", answer))]
    answered = [next(shares[i % world.size]) for i in range(len(questions))]
    probs = [it.probs for it in answered if it.probs]
    return graded(
        [it.text for it in answered],
        questions,
        style.answer_format,
        probs or None,
        [it.sampled for it in answered] if samples else None,
        cut=[it.cut for it in answered],
    )


def _answer(
    sampler: Sampler,
    style: PromptStyle,
    questions: Sequence[Question],
    *,
    samples: int,
    misled: bool,
    seed: int,
    advance: Callable[[int, int], None],
) -> list[Answered]:
    tokenizer, prompts = sampler.tokenizer, style.encode(sampler.tokenizer, questions)
    with _labels_recorded(sampler, style):
        claims = [CLAIM.format(label) for label in style.answer_format.labels] if misled else []
        forced = [style.up_to_answer(tokenizer, it) for it in ("", *claims)] if sampler.label_ids else []
        greedy = sampler(prompts, group_size=1, temperature=0.0, forced=forced, advance=advance)
    sampled: list[list[str | None]] = [[] for _ in questions]
    if samples:
        tokens_only = lambda done, tokens: advance(0, tokens)  # noqa: E731
        drawn = sampler(prompts, group_size=samples, temperature=1.0, seed=seed, advance=tokens_only)
        answers = iter([style.answer_format.parse(text).answer for text in style.texts(tokenizer, drawn)])
        sampled = [list(islice(answers, samples)) for _ in questions]
    texts, probs = style.texts(tokenizer, greedy), _probs(style, sampler, greedy, questions)
    return [Answered(*of) for of in zip(texts, probs, sampled, (~greedy.ended).tolist(), strict=True)]


@contextmanager
def _labels_recorded(sampler: Sampler, style: PromptStyle) -> Iterator[None]:
    """Let the sampler record the labels' log-probs, unless no token tells the labels apart."""
    before = sampler.label_ids
    try:
        sampler.label_ids = list(label_tokens(sampler.tokenizer, style.answer_format))
    except UsageError:
        sampler.label_ids = []
    try:
        yield
    finally:
        sampler.label_ids = before


def _probs(
    style: PromptStyle, sampler: Sampler, greedy: Completions, questions: Sequence[Question]
) -> Sequence[AnswerProbs | None]:
    """Return each question's label probabilities behind the model's own reasoning and behind the forced ones."""
    own, forced = greedy.label_logprobs, greedy.forced_logprobs
    if own is None or forced is None or not (own.isfinite().all() and forced.isfinite().all()):
        return [None] * len(questions)
    found, labels = [], style.answer_format.labels
    for b, place in enumerate(style.answer_places(sampler.tokenizer, greedy)):
        empty, *claimed = ((*row,) for row in forced[b].exp().tolist())
        reasoned = None if place is None else (*own[b, place].exp().tolist(),)
        misled = claimed[wrong_label(questions[b].label, labels)] if claimed else None
        found.append(AnswerProbs(reasoned, empty, misled))
    return found


def load_for_asking(
    config: AskConfig, *, precision: Precision, say: Callable[[str], None]
) -> tuple[Sampler, PromptStyle]:
    """Load a model to answer questions without an engine, on the GPU if there is one.

    say: prints a line, for warnings about the chat template.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = config.trust_remote_code
    shape = shape_of(config.model, trust_remote_code=trust)
    if warning := longer_than_made_for(shape, config.max_prompt_length, config.max_completion_length):
        say(warning)
    tokenizer, style = load_tokenizer(config.model, trust_remote_code=trust), prompt_style(config)
    for line in style.check(tokenizer):
        say(line)
    check_card(precision)
    model = load_policy(config.model, dtype=DTYPES[precision], checkpointing=False, trust_remote_code=trust)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers hides the signature of .to
    stop = config.answer_format.stop
    sampler = Sampler(model, tokenizer, max_completion_length=config.max_completion_length, stop=stop)
    return sampler, style
