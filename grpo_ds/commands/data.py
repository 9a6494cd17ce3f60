"""Show how a data file is understood: fields, answers, lengths, what would be cut, three prompts as rendered.

    grpo-ds data my_questions.csv --labels ja,nein

Takes the flags of `grpo-ds train` for model, data and prompt, and says what a run with them would read. Loads the
model's tokenizer, not the model.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TYPE_CHECKING, Any

from grpo_ds.commands.settle import subject_of
from grpo_ds.errors import DataError
from grpo_ds.memory.choose import choose_model
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.data_flags import DataFlags
from grpo_ds.system.hardware import check_torch, gpu_memory_gib, ram_gib
from grpo_ds.task.numbers import number_of
from grpo_ds.task.prompts import EncodedPrompt, encode_prompt, prompt_warnings
from grpo_ds.task.questions import Question, QuestionSet, read_questions
from grpo_ds.terminal import escape_control_chars

if TYPE_CHECKING:
    from grpo_ds.training.prompt_style import PromptStyle

SHOWN_COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataFlags, AskConfig):
    """Config of `data`: the records, and the prompts that a model would get."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A question and its prompt.

    Example: 12 tokens of the context do not fit.
        Measured(question, EncodedPrompt(ids=[151644, 872, ...], text_tokens_dropped=12)).length  # 780
    """

    question: Question
    prompt: EncodedPrompt

    @property
    def length(self) -> int:
        """Tokens of the prompt as a whole, before its context is cut."""
        return len(self.prompt.ids) + self.prompt.text_tokens_dropped


def main(argv: list[str]) -> None:
    check_torch()
    named = bool(argv) and not argv[0].startswith("-")
    parsed = parse(DataConfig, ["--data", *argv] if named else argv, about=__doc__)
    choice = choose_model(parsed.unchecked().model, gpu_gib=gpu_memory_gib(), ram_gib=ram_gib())
    config = parsed.config(choice.recipe, model=choice.model)
    found = read_questions(config.data, **config.reading)
    config = replace(config, subject=subject_of(config.subject, config.data, found))
    say(f"Data: {found.source}", f"Read as: {found.form}", answers_line(found, config), columns_line(found.questions))
    say(*found.warnings)
    say(*prompt_warnings(found.questions[0], **config.prompting))
    tokenizer, style = loaded(config)
    say(*style.check(tokenizer))
    measured, too_long = measure(tokenizer, style, found.questions)
    say(f"Prompts for {config.model} ({choice.why}):")
    if measured:
        say(*length_lines(measured, style.max_prompt_length))
    if too_long:
        say(f"Too long: {len(too_long)} of {len(found.questions)}; `train` refuses them. {too_long[0]}")
    for it, which in chosen(measured):
        right = " or ".join(filter(None, it.question.accepted or (it.question.label,)))
        title = f"--- {which}, question {it.question.id}, {len(it.prompt.ids)} tokens"
        say("", f"{title}; right answer: {right}" if right else title, str(tokenizer.decode(it.prompt.ids)))


def say(*lines: str) -> None:
    for line in lines:
        print(escape_control_chars(line))


def loaded(config: DataConfig) -> "tuple[Any, PromptStyle]":
    """Load the tokenizer and heavy libraries; their output goes to stderr, because it says nothing about the data."""
    with redirect_stdout(sys.stderr):
        from grpo_ds.models.policy import load_tokenizer
        from grpo_ds.training.prompt_style import prompt_style

        return load_tokenizer(config.model, trust_remote_code=config.trust_remote_code), prompt_style(config)


def answers_line(found: QuestionSet, config: DataConfig) -> str:
    """Describe the right answers: how often each label is right, or what numbers or texts there are."""
    counts = Counter(question.label for question in found.questions)
    if config.answers == "none":
        return "Answers: none; the reward functions decide"
    if config.answers == "labels":
        shares = [f"{label} {counts[label]} ({counts[label] / counts.total():.0%})" for label in config.label_names]
        ((most, count),) = counts.most_common(1)
        return f"Answers: {', '.join(shares)}; always {most} is right in {count / counts.total():.0%}"
    if config.answers == "number":
        numbers = sorted(counts, key=lambda text: number_of(text) or 0)
        return f"Answers: {len(counts)} different numbers, from {numbers[0]} to {numbers[-1]}"
    several = sum(len(question.accepted) > 1 for question in found.questions)
    longest = max(len(text) for question in found.questions for text in question.accepted)
    return f"Answers: {len(counts)} different texts of at most {longest} characters; {several} questions accept several"


def columns_line(questions: Sequence[Question]) -> str:
    """Name the fields of the records, which reward functions get under these names."""
    names = list(questions[0].columns)
    more = f" and {len(names) - SHOWN_COLUMNS} more" * (len(names) > SHOWN_COLUMNS)
    return f"Columns for reward functions: {', '.join(names[:SHOWN_COLUMNS])}{more}"


def measure(
    tokenizer: Any, style: "PromptStyle", questions: Sequence[Question]
) -> tuple[list[Measured], list[DataError]]:
    """Return the prompts that fit once their context is cut, and the errors of the others."""
    measured: list[Measured] = []
    too_long: list[DataError] = []
    limits: dict[str, Any] = {"prefill": style.prefill, "max_prompt_length": style.max_prompt_length, **style.how()}
    for question in questions:
        try:
            measured.append(Measured(question, encode_prompt(tokenizer, question, **limits)))
        except DataError as error:
            too_long.append(error)
    return measured, too_long


def length_lines(measured: Sequence[Measured], limit: int) -> list[str]:
    """Say how long the prompts are, and what they lose at this limit."""
    lengths = [it.length for it in measured]
    cut = [it for it in measured if it.prompt.text_tokens_dropped]
    first = f"Lengths with instructions: {min(lengths)} to {max(lengths)} tokens, median {median_low(lengths)}"
    if not cut:
        return [first, f"Cut: nothing (--max_prompt_length {limit})"]
    most = max(cut, key=lambda it: it.length)
    return [
        first,
        f"Cut: {len(cut)} of {len(measured)} contexts lose their beginning (--max_prompt_length {limit}), the longest "
        f"{most.prompt.text_tokens_dropped} tokens (question {most.question.id}); {most.length} would cut none",
    ]


def chosen(measured: Sequence[Measured]) -> list[tuple[Measured, str]]:
    """Return the shortest prompt, the middle one and the longest, each once."""
    in_order = sorted(measured, key=lambda it: it.length)
    places = {0: "shortest", len(in_order) // 2: "middle", len(in_order) - 1: "longest"} if in_order else {}
    return [(in_order[place], which) for place, which in sorted(places.items())]
