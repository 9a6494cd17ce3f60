"""Flags of the model, the data and the prompt, with their defaults and checks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from grpo_ds.settings.flags import Flags, failed, flag, list_flag, path_flag
from grpo_ds.settings.paths import absolute_if_there
from grpo_ds.task.answers import TAG_NAME, AnswerKind
from grpo_ds.task.numbers import UNIT
from grpo_ds.task.prompts import read_system_prompt
from grpo_ds.task.records import NO_CONTEXT, Unusable
from grpo_ds.task.sources import SAMPLE
from grpo_ds.task.spelling import label_key, nfc

LABELS = "yes,no"  # PubMedQA's, without maybe
MODEL_NAMES = ("auto", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "smollm2-135m")  # models/presets.py


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
    """Flags that choose the model."""

    heading: ClassVar[str] = "model"

    model: str = path_flag(
        "auto",
        "preset (qwen2.5-0.5b, -1.5b, -3b, -7b, smollm2-135m), hub id, folder or GGUF file; auto: what fits",
        path=absolute_if_there(*MODEL_NAMES),
    )
    trust_remote_code: bool = flag(False, "run the Python code that a model brings, with all your rights")


@dataclass(frozen=True, kw_only=True)
class RecordFlags(Flags):
    """Fields of a record, and the answers that are allowed."""

    heading: ClassVar[str] = "data"

    answers: AnswerKind = flag(
        "labels", "answers: one of --labels, a number, a text, or none is right and the reward functions decide"
    )
    labels: str = list_flag(LABELS, "allowed answers, comma-separated; add maybe to keep PubMedQA's maybe questions")
    units: str | None = list_flag(
        None, "with --answers number: units that may stand beside a number, comma-separated: $,dollars,km"
    )
    question_field: str | None = flag(None, "field of a record with the question; default: found (docs/data.md)")
    context_field: str | None = flag(
        None, f"field of a record with the context; {NO_CONTEXT}: no context; default: found"
    )
    label_field: str | None = flag(None, "field of a record with the correct answer; default: found (docs/data.md)")

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.strip() for label in self.labels.split(","))

    @property
    def unit_names(self) -> tuple[str, ...]:
        return tuple(unit.strip() for unit in self.units.split(",")) if self.units else ()

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of task/questions.py that say how records are read."""
        return {
            "labels": self.label_names,
            "fields": self.field_names,
            "answers": self.answers,
            "units": self.unit_names,
        }

    @property
    def field_names(self) -> dict[str, str]:
        """Map question, context and label to the record's field, for the fields that flags name."""
        names = {"question": self.question_field, "context": self.context_field, "label": self.label_field}
        return {field: nfc(name) for field, name in names.items() if name}

    def problems(self) -> list[str]:
        names, different = self.label_names, {label_key(label) for label in self.label_names}
        named, odd = self.field_names, [unit for unit in self.unit_names if not UNIT.fullmatch(unit)]
        closed = self.answers == "labels"
        return [
            *failed(
                (
                    not closed and self.labels != LABELS,
                    f"labels is {self.labels}, but answers is {self.answers}: leave one of them out",
                ),
                (
                    bool(self.units) and self.answers != "number",
                    f"units is {self.units}, but answers is {self.answers}; units belong to --answers number",
                ),
                (bool(odd), f"units: {', '.join(map(repr, odd))} would be read as a part of the number or of a tag"),
                (len(names) < 2 or "" in different, "labels needs two answers or more: yes,no"),
                (len(different) < len(names), f"labels is {self.labels}, which has one answer twice"),
                (
                    len(set(named.values())) < len(named),
                    "question_field, context_field and label_field must name different fields",
                ),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class PromptFlags(Flags):
    """The prompt of a question, and the lengths of prompt and answer."""

    heading: ClassVar[str] = "prompt"

    system_prompt: str | None = path_flag(
        None, 'text file, used unchanged; "": none; default: our own, which asks for the two tags', may_be_empty=True
    )
    subject: str | None = flag(
        None,
        "of the questions, for our own prompt and examples; default: biomedical for PubMedQA's, else not said",
        may_be_empty=True,
    )
    reasoning_tag: str = flag("reasoning", "tag around the reasoning")
    answer_tag: str = flag("answer", "tag around the answer; the closing tag ends a completion")
    few_shot: int = flag(0, "worked examples in the prompt: 0, 1 or 2")
    prefill: bool = flag(False, "put <reasoning> at the end of the prompt, so that the model continues from it")
    max_prompt_length: int = flag(
        768, "tokens; a context that is too long loses its beginning, the question is never cut"
    )
    max_completion_length: int = flag(300, "tokens; a longer completion is cut")

    @cached_property
    def system_prompt_text(self) -> str | None:
        """Text of the file, read once: it may change during a run. None: the default, "": no system prompt.

        `problems` reports errors.
        """
        return read_system_prompt(self.system_prompt) if self.system_prompt else self.system_prompt

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a packed row with one completion."""
        return self.max_prompt_length + self.max_completion_length - 1

    def problems(self) -> list[str]:
        tags = {"reasoning_tag": self.reasoning_tag, "answer_tag": self.answer_tag}
        fault = self._system_prompt_fault()
        return [
            *failed(
                *(
                    (not TAG_NAME.fullmatch(tag), f"{name} is {tag!r}; a tag is one word, without its brackets")
                    for name, tag in tags.items()
                ),
                (self.reasoning_tag == self.answer_tag, "reasoning_tag and answer_tag must differ"),
                (bool(fault), f"system_prompt is {self.system_prompt}, which {fault}"),
                (self.max_prompt_length < 1, "max_prompt_length must be 1 or more"),
                (self.max_completion_length < 1, "max_completion_length must be 1 or more"),
            ),
            *super().problems(),
        ]

    def _system_prompt_fault(self) -> str:
        try:
            _ = self.system_prompt_text
        except Unusable as fault:
            return str(fault)
        return ""


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """Questions, and the share of them that is held out."""

    heading: ClassVar[str] = "data"

    data: str | None = path_flag(
        None,
        "JSON, CSV or Parquet file, hub id (NAME:CONFIG@SPLIT) or sample; default: the golden 500 if here, else sample",
        path=absolute_if_there(SAMPLE),
    )
    eval_fraction: float = flag(0.2, "share of the questions held out for evaluation, by class")
    eval_limit: int | None = flag(None, "maximum number of held-out questions to evaluate on; default: all")
    eval_samples: int = flag(
        0, "answers sampled per held-out question, for the accuracy of their majority; 0: greedy alone"
    )
    eval_misled: bool = flag(
        False, "also evaluate behind a reasoning that claims a wrong label: does the answer follow the reasoning?"
    )
    seed: int = flag(0, "decides the split, the order of questions and every random draw")

    def problems(self) -> list[str]:
        share = f"eval_fraction is {self.eval_fraction}; it must be a share between 0 and 1"
        return [
            *failed(
                (not 0 < self.eval_fraction <= 1, share),
                (self.eval_limit is not None and self.eval_limit < 1, "eval_limit must be 1 or more"),
                (self.eval_samples < 0, f"eval_samples is {self.eval_samples}; it must be 0 (none) or more"),
            ),
            *super().problems(),
        ]
