"""Grade a model's greedy answers to held-out questions.

A model trained here is asked every question of --data (default: its own) that it was not trained on, any other model
the share --eval_fraction. With --eval_fraction 1 all questions are asked, also those that the model was trained on.
"""

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from grpo_ds.commands.settle import subject_of
from grpo_ds.errors import DataError, UsageError
from grpo_ds.memory.choose import choose_model
from grpo_ds.models.shapes import shape_of
from grpo_ds.report.figures import change_lines
from grpo_ds.report.lax import lax_block, lax_lines
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import EvaluateConfig
from grpo_ds.settings.data_flags import MODEL_NAMES
from grpo_ds.settings.flags import Flags, failed, flag, list_flag, path_flag
from grpo_ds.settings.paths import absolute_if_there, absolute_reward_files
from grpo_ds.settings.saved_config import split_recipe
from grpo_ds.system.hardware import check_torch, gpu_memory_gib, native_precision, ram_gib
from grpo_ds.task.grading import Evaluation, small_sample
from grpo_ds.task.lax import lax_grades
from grpo_ds.task.questions import (
    Question,
    QuestionSet,
    first_in_proportion,
    in_random_order,
    not_among,
    read_questions,
    split_questions,
)
from grpo_ds.task.reward_files import find_reward_functions, reward_problems
from grpo_ds.task.rewards import READY_MADE, REASONING_GAIN, WeightedFunctions, ready_made
from grpo_ds.task.scoring import Rewards, Sampled, columns_for_rewards, score

if TYPE_CHECKING:
    from grpo_ds.report.console import Console
    from grpo_ds.training.prompt_style import PromptStyle
    from grpo_ds.training.sampling import Sampler

ROWS_AT_ONCE = 16
OF_TEXT = tuple(name for name in READY_MADE if name != REASONING_GAIN)  # rewards that need no training


@dataclass(frozen=True, kw_only=True)
class GradingFlags(Flags):
    """How answers are read."""

    heading: ClassVar[str] = "grading"

    grading: Literal["strict", "lax"] = flag(
        "strict", "lax: report beside the strict figures those of parsers that need no form (docs/the_recipe.md)"
    )
    compare_with: str | None = path_flag(
        None,
        "a second model (as --model), asked the same in the same way; adds paired tests",
        path=absolute_if_there(*MODEL_NAMES),
    )
    reward_funcs: str | None = list_flag(
        None,
        f"also report mean rewards: {', '.join(OF_TEXT)}, FILE.py:FUNCTION, module.FUNCTION",
        path=absolute_reward_files,
    )
    json: bool = flag(False, "print all figures as a JSON object, alone on stdout, in place of the table")

    def problems(self) -> list[str]:
        return [
            *failed((self.compare_with == "auto", "compare_with is auto; name a model")),
            *(reward_problems(self.reward_funcs, None) if self.reward_funcs else []),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class GradingConfig(GradingFlags, EvaluateConfig):
    """Config of `eval`. Training has no --grading: lax figures are for comparison, never to train on or choose by."""

    def problems(self) -> list[str]:
        none, named = self.answers == "none", self.reward_funcs or ""
        return [
            *super().problems(),
            *failed(
                (none and not named, "answers is none, so only rewards can grade: --reward_funcs FILE.py:FUNCTION"),
                (none and self.grading == "lax", "grading lax reads answers, but answers is none: leave it out"),
                *self.reward_checks(named),
                (REASONING_GAIN in named.split(","), "reward_funcs has reasoning_gain, which only training measures"),
            ),
        ]


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of an evaluation, and how many the model was trained on.

    Example: of a file of 160 questions, 128 of which the model was trained on.
        Asked("sample: 160 questions (80 yes, 80 no)", questions, trained_on=0, left_out=128).described()
        # "sample: 160 questions (80 yes, 80 no); 32 asked; 128, which the model was trained on, are left out"
    """

    source: str  # name and counts of the data
    questions: list[Question]
    trained_on: int | None  # of these; None: not recorded beside the model
    left_out: int | None  # questions of the data that are not asked because the model was trained on them

    def described(self) -> str:
        others = f"; {self.left_out}, which the model was trained on, are left out" if self.left_out else ""
        known = f"\nWarning: the model was trained on {self.trained_on} of these questions." if self.trained_on else ""
        return f"{self.source}; {len(self.questions)} asked{others}{known}"


def main(argv: list[str]) -> None:
    check_torch()
    config, why, asked = prepare(argv)
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        figures = graded(config, why, asked)
    if config.json:
        print(json.dumps(figures, indent=1), flush=True)


def graded(config: GradingConfig, why: str, asked: Asked) -> dict[str, Any]:
    """Ask the model, print its table, and return all figures. why: the reason for this model."""
    from grpo_ds.report.console import Console  # heavy libraries are loaded from here on
    from grpo_ds.report.held_out import paired_tests

    rewards = reward_functions(config, asked.questions) if config.reward_funcs else {}
    console = Console(prints_results=True)
    shape_of(config.model, trust_remote_code=config.trust_remote_code)
    console.line(f"Model: {config.model} ({why})\nData: {asked.described()}")
    if config.compare_with:  # before the first one is asked, which takes minutes
        with _naming_its_flag():
            shape_of(config.compare_with, trust_remote_code=config.trust_remote_code)
    result, prompts = _ask(config, asked, rewards, console)
    more: dict[str, Any] = {"trained_on": asked.trained_on, "left_out_as_trained_on": asked.left_out}
    name = Path(config.model).name
    if config.compare_with:
        with _naming_its_flag():
            other, _ = _ask(replace(config, model=config.compare_with), asked, rewards, console)
        more["compared_with"] = {"model": config.compare_with, **other.figures()}
        more |= paired_tests(asked.questions, other, result)
        console.before_and_after(other, result, asked.questions, names=(Path(config.compare_with).name, name))
    else:
        console.figures({name: result}, len(asked.questions))
        for line in change_lines(result.figures()):
            console.line(line)
    if result.grades and (warning := small_sample(result.grades.count, result.grades.accuracy_interval)):
        console.line(f"Warning: {warning}")
    if config.grading == "lax" and result.grades:
        found = lax_grades(result.texts, prompts, asked.questions, config.answer_format)
        console.line(lax_lines(result.grades, found))
        more["lax"] = lax_block(found)
    return {**result.figures(), **more}


@contextmanager
def _naming_its_flag() -> Iterator[None]:
    """Errors about the second model name --compare_with, not --model."""
    try:
        yield
    except UsageError as error:
        raise type(error)(str(error).replace("--model ", "--compare_with ")) from None


def _ask(
    config: GradingConfig, asked: Asked, rewards: WeightedFunctions, console: "Console"
) -> tuple[Evaluation, list[str]]:
    """Load the model and ask it; return the evaluation, with rewards if functions are given, and the prompts."""
    from grpo_ds.system.ranks import World
    from grpo_ds.training.evaluate import evaluate, load_for_asking

    precision = native_precision(on_gpu=gpu_memory_gib() is not None)
    sampler, style = load_for_asking(config, precision=precision, say=console.line)
    sampler.rows_at_once = config.generation_batch_size or ROWS_AT_ONCE
    alone = World(rank=0, size=1, device=sampler.model.device)
    with console.progress("Evaluation", len(asked.questions), announce=True) as advance:
        samples, misled = config.eval_samples, config.eval_misled
        result = evaluate(sampler, style, asked.questions, alone, samples=samples, misled=misled, advance=advance)
    console.broken_rules(result)
    if rewards:
        result = result.rewarded(rewards_of(result.texts, asked.questions, rewards, sampler, style))
        for error in result.rewards.errors.values() if result.rewards else ():
            console.line(f"Warning: {error}")
    return result, [prompt.text for prompt in style.shown(sampler.tokenizer, asked.questions)]


def reward_functions(config: GradingConfig, questions: Sequence[Question]) -> WeightedFunctions:
    """Return the functions of --reward_funcs, each with weight 1, checked against the data's columns."""
    own = ready_made(answer_format=config.answer_format, max_completion_length=config.max_completion_length)
    columns = columns_for_rewards(questions)
    return find_reward_functions(config.reward_funcs or "", None, columns=columns, ready_made=own)


def rewards_of(
    texts: Sequence[str],
    questions: Sequence[Question],
    functions: WeightedFunctions,
    sampler: "Sampler",
    style: "PromptStyle",
) -> Rewards:
    """Score one text for each question; a function that fails counts as one that does not apply."""
    from transformers import TrainerState

    encode = sampler.tokenizer.encode
    ids = [encode(text, add_special_tokens=False) for text in texts]
    sampled = Sampled(style.shown(sampler.tokenizer, questions), ids, TrainerState())
    return score(texts, questions, functions=functions, sampled=sampled, on_error="zero")


def prepare(argv: list[str]) -> tuple[GradingConfig, str, Asked]:
    """Return the config, the reason for its model, and the questions; loads nothing heavy."""
    parsed = parse(GradingConfig, argv, about=__doc__)
    choice = choose_model(parsed.unchecked().model, gpu_gib=gpu_memory_gib(), ram_gib=ram_gib())
    folder = Path(choice.model)
    config = parsed.config({**choice.recipe, **split_recipe(folder)}, model=choice.model)
    found = read_questions(config.data, **config.reading)
    config = replace(config, subject=subject_of(config.subject, config.data, found))
    share_given = "eval_fraction" in parsed.typed
    return config, choice.why, asked_questions(config, found, read_trained_on(folder), share_given=share_given)


def asked_questions(
    config: EvaluateConfig, found: QuestionSet, trained_on: Collection[str] | None, *, share_given: bool
) -> Asked:
    """Choose the questions to ask.

    trained_on: fingerprints; None: not recorded. share_given: the user has set --eval_fraction. Raises DataError if
    none is left.
    """
    every, known = list(found.questions), trained_on or ()
    fresh, by_class = not_among(known, every), config.answer_format.is_closed
    if config.eval_fraction == 1:
        chosen = every
    elif trained_on is None or share_given:
        _, chosen = split_questions(
            every, eval_fraction=config.eval_fraction, seed=config.seed, trained_on=known, by_class=by_class
        )
    else:
        chosen = in_random_order(fresh, seed=config.seed)
    if not chosen:
        raise DataError(
            f"{found.source}: none is left to ask that {config.model} was not trained on.\n"
            "Give questions that it has not seen (--data), or ask these all the same: --eval_fraction 1"
        )
    questions = first_in_proportion(chosen, config.eval_limit, by_class=by_class)
    if trained_on is None:
        return Asked(found.source, questions, None, None)
    left_out = 0 if chosen is every else len(every) - len(fresh)
    return Asked(found.source, questions, len(questions) - len(not_among(known, questions)), left_out)
