"""Grade a model's greedy answers to held-out questions.

A model trained here is asked every question of --data that it was not trained on, any other model the share
--eval_fraction. With --eval_fraction 1 all questions are asked, also those that the model was trained on.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from grpo_ds.errors import DataError
from grpo_ds.memory.choose import choose_model
from grpo_ds.report.lax import lax_block, lax_lines
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import EvaluateConfig
from grpo_ds.settings.flags import Flags, flag
from grpo_ds.settings.saved_config import split_recipe
from grpo_ds.system.hardware import check_torch, gpu_memory_gib, native_precision, ram_gib
from grpo_ds.task.grading import small_sample
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

ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class GradingFlags(Flags):
    """How answers are read."""

    heading: ClassVar[str] = "grading"

    grading: Literal["strict", "lax"] = flag(
        "strict", "lax: report beside the strict figures those of parsers that need no form (docs/the_recipe.md)"
    )


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
    from grpo_ds.system.ranks import World
    from grpo_ds.training.evaluate import evaluate, load_for_asking

    console = Console(prints_results=True)
    console.line(f"Model: {config.model} ({why})\nData: {asked.described()}")
    precision = native_precision(on_gpu=gpu_memory_gib() is not None)
    sampler, style = load_for_asking(config, precision=precision, say=console.line)
    sampler.rows_at_once = config.generation_batch_size or ROWS_AT_ONCE
    alone = World(rank=0, size=1, device=sampler.model.device)
    with console.progress("Evaluation", len(asked.questions), announce=True) as advance:
        samples, misled = config.eval_samples, config.eval_misled
        result = evaluate(sampler, style, asked.questions, alone, samples=samples, misled=misled, advance=advance)
    if warning := small_sample(result.grades.count, result.grades.accuracy_interval):
        console.line(f"Warning: {warning}")
    counts = {"trained_on": asked.trained_on, "left_out_as_trained_on": asked.left_out}
    lax = {}
    if config.grading == "lax":
        prompts = [prompt.text for prompt in style.shown(sampler.tokenizer, asked.questions)]
        found = lax_grades(result.texts, prompts, asked.questions, labels=config.label_names)
        console.line(lax_lines(result.grades, found))
        lax = {"lax": lax_block(found)}
    console.line(json.dumps({**result.figures(), **counts, **lax}, indent=1))


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
