"""Grade a model's greedy answers to held-out questions.

A model trained here is asked every question of --data that it was not trained on, any other model the share
--eval_fraction. With --eval_fraction 1 all questions are asked, also those that the model was trained on.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from grpo_ds.errors import DataError
from grpo_ds.memory.choose import choose_model
from grpo_ds.models.shapes import shape_of
from grpo_ds.report.lax import lax_block, lax_lines
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import EvaluateConfig
from grpo_ds.settings.data_flags import MODEL_NAMES
from grpo_ds.settings.flags import Flags, failed, flag, path_flag
from grpo_ds.settings.paths import absolute_if_there
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

if TYPE_CHECKING:
    from grpo_ds.report.console import Console

ROWS_AT_ONCE = 16


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

    def problems(self) -> list[str]:
        return [*failed((self.compare_with == "auto", "compare_with is auto; name a model")), *super().problems()]


@dataclass(frozen=True, kw_only=True)
class GradingConfig(GradingFlags, EvaluateConfig):
    """Config of `eval`. Training has no such flag: lax figures are for comparison, never to train on or choose by."""


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

    from grpo_ds.report.console import Console  # heavy libraries are loaded from here on
    from grpo_ds.report.held_out import paired_tests

    console = Console(prints_results=True)
    console.line(f"Model: {config.model} ({why})\nData: {asked.described()}")
    models = [config.model, *filter(None, [config.compare_with])]
    for name in models:  # before the first one is asked, which takes minutes
        shape_of(name, trust_remote_code=config.trust_remote_code)
    result, prompts = _ask(config, asked, console)
    more: dict[str, Any] = {"trained_on": asked.trained_on, "left_out_as_trained_on": asked.left_out}
    if config.compare_with:
        other, _ = _ask(replace(config, model=config.compare_with), asked, console)
        more["compared_with"] = {"model": config.compare_with, **other.figures()}
        more |= paired_tests(asked.questions, other, result)
        console.before_and_after(other, result, asked.questions, names=(Path(models[1]).name, Path(models[0]).name))
    if warning := small_sample(result.grades.count, result.grades.accuracy_interval):
        console.line(f"Warning: {warning}")
    if config.grading == "lax":
        found = lax_grades(result.texts, prompts, asked.questions, labels=config.label_names)
        console.line(lax_lines(result.grades, found))
        more["lax"] = lax_block(found)
    console.line(json.dumps({**result.figures(), **more}, indent=1))


def _ask(config: GradingConfig, asked: Asked, console: "Console") -> tuple[Evaluation, list[str]]:
    """Load the model and ask it; return the evaluation and the prompts."""
    from grpo_ds.system.ranks import World
    from grpo_ds.training.evaluate import evaluate, load_for_asking

    precision = native_precision(on_gpu=gpu_memory_gib() is not None)
    sampler, style = load_for_asking(config, precision=precision, say=console.line)
    sampler.rows_at_once = config.generation_batch_size or ROWS_AT_ONCE
    alone = World(rank=0, size=1, device=sampler.model.device)
    with console.progress("Evaluation", len(asked.questions), announce=True) as advance:
        samples, misled = config.eval_samples, config.eval_misled
        result = evaluate(sampler, style, asked.questions, alone, samples=samples, misled=misled, advance=advance)
    return result, [prompt.text for prompt in style.shown(sampler.tokenizer, asked.questions)]


def prepare(argv: list[str]) -> tuple[GradingConfig, str, Asked]:
    """Return the config, the reason for its model, and the questions; loads nothing heavy."""
    parsed = parse(GradingConfig, argv, about=__doc__)
    choice = choose_model(parsed.unchecked().model, gpu_gib=gpu_memory_gib(), ram_gib=ram_gib())
    folder = Path(choice.model)
    config = parsed.config({**choice.recipe, **split_recipe(folder)}, model=choice.model)
    found = read_questions(config.data, labels=config.label_names, fields=config.field_names)
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
    fresh = not_among(known, every)
    if config.eval_fraction == 1:
        chosen = every
    elif trained_on is None or share_given:
        _, chosen = split_questions(every, eval_fraction=config.eval_fraction, seed=config.seed, trained_on=known)
    else:
        chosen = in_random_order(fresh, seed=config.seed)
    if not chosen:
        raise DataError(
            f"{found.source}: none is left to ask that {config.model} was not trained on.\n"
            "Give questions that it has not seen (--data), or ask these all the same: --eval_fraction 1"
        )
    questions = first_in_proportion(chosen, config.eval_limit)
    if trained_on is None:
        return Asked(found.source, questions, None, None)
    left_out = 0 if chosen is every else len(every) - len(fresh)
    return Asked(found.source, questions, len(questions) - len(not_among(known, questions)), left_out)
