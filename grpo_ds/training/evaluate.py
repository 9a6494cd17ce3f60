"""Answer the held-out questions greedily and grade the answers."""

from collections.abc import Callable, Sequence

import torch

from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.shapes import longer_than_made_for, shape_of
from grpo_ds.settings.config import AskConfig
from grpo_ds.system.hardware import Precision
from grpo_ds.system.ranks import World
from grpo_ds.task.grading import Evaluation, graded
from grpo_ds.task.questions import Question
from grpo_ds.training.precision import DTYPES, check_card
from grpo_ds.training.prompt_style import PromptStyle, prompt_style
from grpo_ds.training.sampling import Sampler


def evaluate(
    sampler: Sampler,
    style: PromptStyle,
    questions: Sequence[Question],
    world: World,
    *,
    advance: Callable[[int, int], None] = lambda done, tokens: None,
    run: Callable[[str, Callable[[], list[str]]], list[str]] = lambda phase, work: work(),
) -> Evaluation:
    """Answer and grade the questions: every rank answers its share and returns the complete evaluation.

    advance: called with the numbers of questions that this rank answered and of tokens drawn, since the last call.
    run: Guard.run, so that a signal can stop ranks while they answer.
    """

    def answer() -> list[str]:
        mine = questions[world.rank :: world.size]
        if not mine:
            return []
        prompts = style.encode(sampler.tokenizer, mine)
        return style.texts(sampler.tokenizer, sampler(prompts, group_size=1, temperature=0.0, advance=advance))

    shares = world.gather(run("evaluate", answer))
    texts = [shares[i % world.size][i // world.size] for i in range(len(questions))]
    return graded(texts, questions, style.answer_format)


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
