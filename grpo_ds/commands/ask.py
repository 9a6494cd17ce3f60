"""Ask a model: --question and --context, or --file for many questions; without them, type questions at a terminal.

Answers are greedy; a model trained here gets its training prompt. Only answers go to stdout, so that --json can be
piped.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grpo_ds.commands.evaluate import ROWS_AT_ONCE
from grpo_ds.errors import DataError, UsageError, one_error
from grpo_ds.memory.choose import choose_model
from grpo_ds.report.long_work import Advance, ProgressLines, Work
from grpo_ds.run_folder.trained_on import read_trained_on
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.flags import Flags, failed, flag, path_flag
from grpo_ds.settings.paths import absolute_unless
from grpo_ds.settings.saved_config import CONFIG_FILE
from grpo_ds.system.hardware import Precision, check_torch, gpu_memory_gib, native_precision, ram_gib
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import broken_rule
from grpo_ds.task.grading import is_right
from grpo_ds.task.questions import Question, fingerprint, unanswered_questions
from grpo_ds.task.records import NO_CONTEXT, Unusable, sound_text
from grpo_ds.task.scoring import right_answers
from grpo_ds.task.sources import Source, parse_file
from grpo_ds.terminal import escape_control_chars

if TYPE_CHECKING:
    from grpo_ds.training.prompt_style import PromptStyle
    from grpo_ds.training.sampling import Sampler

STDIN = "-"
NO_SETTINGS = (
    f"{{}} has no {CONFIG_FILE}, so the prompt that it was trained with is not known: it gets our default prompt, or\n"
    "what --system_prompt, --few_shot and the other flags of the prompt say."
)
TRAINED_ON = " (the model was trained on this question)"
WAYS = ("question", "file", "interactive")
HOW = (
    "Give --question and --context, or --file FILE (-: standard input). At a terminal both may be left out.\n"
    "A model that was trained with contexts is asked without one by --context_field none."
)


@dataclass(frozen=True, kw_only=True)
class QuestionFlags(Flags):
    """The questions, and how answers are printed."""

    heading: ClassVar[str] = "questions"

    question: str = flag("", "a question")
    context: str = flag("", "the text that answers it")
    file: str = path_flag(
        "",
        "JSON, CSV or Parquet with questions, labels not needed; -: standard input",
        path=absolute_unless(STDIN),
    )
    interactive: bool = flag(False, "type questions one after another; default: at a terminal, if no question is given")
    json: bool = flag(
        False,
        "print a JSON object per line: id, question, reasoning, answer, text; label, right, trained_on if known; "
        "broken_rule if it is out of form",
    )

    def problems(self) -> list[str]:
        ways = [name for name in WAYS if getattr(self, name)]
        stray = bool(self.context) and ways not in ([], ["question"])
        return [
            *failed(
                (len(ways) > 1, f"{' and '.join(ways)} exclude each other"),
                (stray, "context belongs to question; a file's records hold their own"),
            ),
            *super().problems(),
        ]

    @property
    def typed_at_terminal(self) -> bool:
        nothing = not (self.question or self.context or self.file)
        return self.interactive or (nothing and sys.stdin.isatty())


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(QuestionFlags, AskConfig):
    """Config of `ask`: a model and its questions."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and the model's answer.

    Example:
        answered(question, "<reasoning>It fell.</reasoning><answer>yes</answer>", AnswerFormat(), None).reasoning
        # "It fell."
    """

    question: Question
    text: str  # the complete completion
    reasoning: str
    rest: str  # the text after the reasoning
    answer: str | None  # as AnswerFormat.parse returns it; None if the completion is not in the required form
    right: bool | None  # None: the right answer is not known, or none is right
    trained_on: bool | None = None  # the model was trained on this question; None: not recorded beside the model
    broken: str = ""  # the rule of the form that the text breaks (task/broken_rules.py)
    in_form: bool = True  # False: no form is asked for (--answers none), so the text is the answer

    def as_text(self) -> str:
        if not self.in_form:
            cut = f" ({self.broken})" if self.broken else ""
            return escape_control_chars(f"Answer: {self.text}{cut}{TRAINED_ON * bool(self.trained_on)}")
        wrote = f"; the model wrote {self.rest!r}" if self.rest.strip() else ""
        answer = self.answer or f"none in the required form ({self.broken}){wrote}"
        label = f" (the label: {self.question.label})" if self.question.label else ""
        label += TRAINED_ON * bool(self.trained_on)
        return escape_control_chars(f"Reasoning: {self.reasoning}\nAnswer: {answer}{label}")

    def as_json(self) -> str:
        """One line of ASCII, which cannot control a terminal."""
        question = self.question
        known: dict[str, Any] = {} if self.right is None else {"label": question.label, "right": self.right}
        known |= {} if self.trained_on is None else {"trained_on": self.trained_on}
        found: dict[str, Any] = {"reasoning": self.reasoning, "answer": self.answer} if self.in_form else {}
        found |= {"broken_rule": self.broken} if self.broken else {}
        found["text"] = self.text
        return json.dumps({"id": question.id, "question": question.text, **found, **known})


def main(argv: list[str]) -> None:
    check_torch()
    parsed, gpu_gib = parse(QuestionConfig, argv, about=__doc__), gpu_memory_gib()
    choice = choose_model(parsed.unchecked().model, gpu_gib=gpu_gib, ram_gib=ram_gib())
    config = parsed.config(choice.recipe, model=choice.model)
    questions = [] if config.typed_at_terminal else given_questions(config)
    trained_on = read_trained_on(Path(config.model))
    if Path(config.model).is_dir() and not (Path(config.model) / CONFIG_FILE).is_file():
        print(escape_control_chars(NO_SETTINGS.format(config.model)), file=sys.stderr)
    sampler, style = loaded(config, precision=native_precision(on_gpu=gpu_gib is not None))
    show = show_as(config)
    if config.typed_at_terminal:
        print(escape_control_chars(f"Model: {config.model} ({choice.why})"), file=sys.stderr)
        return converse(lambda question: show(*answers(sampler, style, [question], trained_on)), config)
    lines = ProgressLines(progress_line)
    with lines.follow(Work("Answers", len(questions), "questions")) as advance:
        for answered in answers(sampler, style, questions, trained_on, advance):
            show(answered)
            lines.printed()


def progress_line(text: str) -> None:
    """Print progress on stderr, unless the answers themselves show it at a terminal."""
    if not sys.stdout.isatty():
        print(text, file=sys.stderr, flush=True)


def loaded(config: QuestionConfig, *, precision: Precision) -> "tuple[Sampler, PromptStyle]":
    """Load heavy libraries and the model; their output goes to stderr, because it is not an answer."""
    with redirect_stdout(sys.stderr):
        from grpo_ds.training.evaluate import load_for_asking

        return load_for_asking(config, precision=precision, say=lambda line: print(escape_control_chars(line)))


def given_questions(config: QuestionConfig) -> list[Question]:
    """Return the questions of the file, or the single question of the flags."""
    if config.file:
        return unanswered_questions(opened(config.file), **config.reading)
    texts, problems = {"question": "", "context": ""}, []
    for name, text in (("question", config.question), ("context", config.context)):
        if text or name == "question" or config.context_field != NO_CONTEXT:
            try:
                texts[name] = sound(f"--{name}", text)
            except Unusable as fault:
                problems.append(str(fault))
    if problems:
        raise one_error(UsageError, "This cannot be asked:", problems, HOW)
    return [Question(id="asked", text=texts["question"], context=texts["context"], label="")]


def sound(name: str, text: str) -> str:
    """Check the text like a text of a record. Raises Unusable, with the name in its message."""
    try:
        return sound_text(text)
    except Unusable as fault:
        raise Unusable(f"{name} {fault}") from None


def opened(file: str) -> Source:
    """Read a file or a pipe, once."""
    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"--file {file} cannot be read: {error.strerror or error}.") from None
    return parse_file("standard input" if file == STDIN else file, content)


def answers(
    sampler: "Sampler",
    style: "PromptStyle",
    questions: Sequence[Question],
    trained_on: Collection[str] | None,
    advance: Advance = lambda done, tokens: None,
) -> Iterator[Answered]:
    """Yield one answer per question, in order, as soon as its batch is done.

    trained_on: fingerprints, if known. advance: told of every token, as by the sampler.
    """
    style.encode(sampler.tokenizer, questions)  # reports a question that is too long before any is answered
    for first in range(0, len(questions), ROWS_AT_ONCE):
        some = questions[first : first + ROWS_AT_ONCE]
        completions = sampler(style.encode(sampler.tokenizer, some), group_size=1, temperature=0.0, advance=advance)
        texts, ended = style.texts(sampler.tokenizer, completions), completions.ended.tolist()
        for question, text, whole in zip(some, texts, ended, strict=True):
            known = None if trained_on is None else fingerprint(question) in trained_on
            yield answered(question, text, style.answer_format, known, cut=not whole)


def answered(
    question: Question, text: str, form: AnswerFormat, trained_on: bool | None, *, cut: bool = False
) -> Answered:
    """Return the answer that a completion gives. cut: it has not ended by itself."""
    broken = broken_rule(text, form, cut=cut)
    if form.kind == "none":
        return Answered(question, text, "", text, None, None, trained_on, broken, in_form=False)
    answer = form.parse(text).answer
    right = is_right(answer, question, form) if right_answers(question) else None
    return Answered(question, text, *form.split(text), answer, right, trained_on, broken)


def show_as(config: QuestionConfig) -> Callable[[Answered], None]:
    """Return a function that prints an answer as JSON or text; questions of a file are printed too."""

    def show(answered: Answered) -> None:
        question = answered.question
        heading = escape_control_chars(f"{question.id}: {question.text}\n") if config.file else ""
        print(answered.as_json() if config.json else f"{heading}{answered.as_text()}", flush=True)
        if not config.json and not config.question:
            print(flush=True)

    return show


def converse(answer: Callable[[Question], None], config: QuestionConfig) -> None:
    """Ask for a question, answer it, repeat; a question that cannot be asked is reported."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  lets input() take lines longer than the terminal's 4096 bytes
    with_context = config.context_field != NO_CONTEXT
    print(f"{'An empty line ends a context; a' if with_context else 'A'}n empty question quits.", file=sys.stderr)
    while text := typed_line("Question: "):
        lines = iter(lambda: typed_line("Context: "), "") if with_context else ()
        try:
            context = sound("The context", "\n".join(lines)) if with_context else ""
            answer(Question("asked", sound("The question", text), context, ""))
        except (Unusable, DataError) as fault:
            print(escape_control_chars(str(fault)), file=sys.stderr)


def typed_line(prompt: str) -> str:
    """Read a line from the terminal, "" at Ctrl-D; the prompt stays out of a pipe that takes the answers."""
    try:
        if sys.stdout.isatty():
            return input(prompt).strip()
        print(prompt, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        print(file=sys.stderr)
        return ""
