"""Grading: the figures that fit a kind of answer, and a test if a model became better.

Accuracy alone is misleading for labels: the answer "yes" to every question is right for 62 % of PubMedQA's yes/no test
items. So macro-F1, recall by class and the majority baseline are reported with it. An answer that did not parse (None)
is wrong and counts as a prediction of no class. Where no answer is right, the mean of each reward is the grade.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb
from typing import Any

from grpo_ds.errors import DataError
from grpo_ds.task.answer_probs import AnswerProbs, Confidence, confidence
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.broken_rules import CUT, broken_rule
from grpo_ds.task.earned import Earned, earned
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards, right_answers
from grpo_ds.task.statistics import wilson_interval

EVAL_ACCURACY, EVAL_REWARD = "eval/accuracy", "eval/reward"
COLLAPSED_SHARE = 0.95
FEWEST_TO_COLLAPSE = 5  # parsed answers; four equal ones can be chance
FEWEST_TO_COMPARE = 20  # questions; fewer have an interval of 40 points or more around a half


@dataclass(frozen=True, slots=True)
class Grades:
    """Figures of answers that are right or wrong; every share is in [0, 1].

    Example: two numbers, one of them right.
        >>> questions = [Question("1", "6 x 7?", "", "42"), Question("2", "1 / 2?", "", "0.5")]
        >>> grade_answers(["42", "2"], questions, AnswerFormat(kind="number")).accuracy
        0.5
    """

    count: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # Wilson, 95 %
    well_formed: float  # share of answers that parsed


@dataclass(frozen=True, slots=True)
class ClassGrades(Grades):
    """Figures of answers that are one of a few labels; the dicts are by label.

    Example: one question of each class, both answered "yes".
        >>> questions = [Question("1", "Is it?", "", "yes"), Question("2", "Was it?", "", "no")]
        >>> grades = grade(["yes", "yes"], questions, labels=("yes", "no"))
        >>> grades.accuracy, grades.recall, grades.predicted
        (0.5, {'yes': 1.0, 'no': 0.0}, {'yes': 2, 'no': 0})
    """

    macro_f1: float  # mean F1 of the classes that occur among the questions
    recall: dict[str, float]  # the same classes
    majority_baseline: float  # accuracy of always giving the most common label
    predicted: dict[str, int]  # number of parsed answers
    collapsed: bool  # nearly all parsed answers are one class, but the labels are not


@dataclass(frozen=True, slots=True)
class Votes:
    """Accuracy of the majority of several sampled answers; an answer that did not parse has no vote."""

    samples: int  # answers per question
    vote_accuracy: float
    vote_accuracy_interval: tuple[float, float]  # Wilson, 95 %


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Completions and parsed answers in the order of the questions, and the grades of all.

    Example:
        >>> texts = ["<reasoning>It fell.</reasoning><answer>yes</answer>", "I am not sure."]
        >>> questions = [Question("1", "Is it?", "", "yes"), Question("2", "Was it?", "", "no")]
        >>> evaluation = graded(texts, questions, AnswerFormat())
        >>> evaluation.answers, evaluation.grades.accuracy
        (['yes', None], 0.5)
    """

    texts: list[str]
    answers: list[str | None]
    grades: Grades | None  # ClassGrades of labels; None: no answer is right
    right: list[bool] | None  # None: no answer is right
    probs: list[AnswerProbs] | None = None  # None: no token tells the labels apart, or an older version answered
    confidence: Confidence | None = None  # figures of probs
    sampled: list[list[str | None]] | None = None  # further answers to each question: --eval_samples
    votes: Votes | None = None  # figures of them
    rewards: Rewards | None = None  # of the texts, if they are the grade
    earned: Earned | None = None  # figures of them
    broken: list[str] = field(default_factory=list)  # the rule that each text breaks, "" if none (broken_rules.py)

    @property
    def quality(self) -> float | None:
        """Accuracy, or the mean reward if no answer is right; None if neither is known."""
        if self.grades:
            return self.grades.accuracy
        return self.earned.mean_reward if self.earned else None

    def figures(self) -> dict[str, Any]:
        """Return all figures under their names in the summary of a run."""
        parts = (self.grades, self.confidence, self.votes, self.earned)
        return {name: value for part in parts if part is not None for name, value in asdict(part).items()}

    def of(self, chosen: Sequence[int], questions: Sequence[Question], answer_format: AnswerFormat) -> "Evaluation":
        """The evaluation of some of the questions only: those at the indices `chosen`."""

        def some(every: list[Any] | None) -> list[Any] | None:
            return None if every is None else [every[i] for i in chosen]

        asked, texts = [questions[i] for i in chosen], [self.texts[i] for i in chosen]
        cut = [rule == CUT for rule in some(self.broken or None) or ()]
        picked = graded(texts, asked, answer_format, some(self.probs), some(self.sampled), cut=cut)
        return picked.rewarded(self.rewards.rows(chosen)) if self.rewards else picked

    def rewarded(self, rewards: Rewards) -> "Evaluation":
        """The evaluation with the rewards of its texts as the grade."""
        return replace(self, rewards=rewards, earned=earned(rewards))


def graded(
    texts: list[str],
    questions: Sequence[Question],
    answer_format: AnswerFormat,
    probs: list[AnswerProbs] | None = None,
    sampled: list[list[str | None]] | None = None,
    *,
    cut: Sequence[bool] = (),
) -> Evaluation:
    """Parse and grade one completion for each question, with its label probabilities and sampled answers if known.

    cut: for each completion, True if it has not ended by itself; (): not known.
    """
    answers, labels = [answer_format.parse(text).answer for text in texts], answer_format.labels
    return Evaluation(
        texts,
        answers,
        grade_answers(answers, questions, answer_format),
        None if answer_format.kind == "none" else answered_right(answers, questions, answer_format),
        probs,
        confidence(probs, questions, labels=labels) if probs else None,
        sampled,
        count_votes(sampled, questions, answer_format) if sampled else None,
        broken=[broken_rule(text, answer_format, cut=bool(cut) and cut[i]) for i, text in enumerate(texts)],
    )


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the figures that are logged at every --eval_steps, in a line of metrics.jsonl of their own."""
    grades, known, rewards = evaluation.grades, evaluation.confidence, evaluation.earned
    metrics: dict[str, float] = {}
    if grades:
        metrics |= {EVAL_ACCURACY: grades.accuracy, "eval/well_formed": grades.well_formed}
    if isinstance(grades, ClassGrades):
        metrics["eval/macro_f1"] = grades.macro_f1
    if known:
        metrics |= {"eval/mean_p_right": known.mean_p_right, "eval/calibration_error": known.calibration_error}
        metrics |= {f"eval/lean/{label}": p for label, p in known.lean.items()}
        if known.auc is not None:
            metrics["eval/auc"] = known.auc
        if known.reasoning_gain is not None:
            metrics["eval/reasoning_gain"] = known.reasoning_gain
    if rewards:
        means = rewards.mean_rewards.items()
        metrics[EVAL_REWARD] = rewards.mean_reward
        metrics |= {f"eval/rewards/{name}/mean": value for name, value in means if value is not None}
    return metrics


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Return True for a line of metrics that `evaluation_metrics` made."""
    return EVAL_ACCURACY in line or EVAL_REWARD in line


def is_right(answer: str | None, question: Question, answer_format: AnswerFormat) -> bool:
    """Return True if an answer, as `AnswerFormat.parse` returns it, is a right one."""
    return answer_format.is_right(answer, right_answers(question))


def answered_right(
    answers: Sequence[str | None], questions: Sequence[Question], answer_format: AnswerFormat
) -> list[bool]:
    """Return a bool for each question: True if its answer is right."""
    return [is_right(answer, question, answer_format) for answer, question in zip(answers, questions, strict=True)]


def count_votes(
    sampled: Sequence[Sequence[str | None]], questions: Sequence[Question], answer_format: AnswerFormat
) -> Votes:
    """Grade the most common of each question's answers; of equally common ones the one that was drawn first."""
    right = sum(answered_right([_vote(answers, answer_format) for answers in sampled], questions, answer_format))
    return Votes(len(sampled[0]), right / len(questions), wilson_interval(right, len(questions)))


def _vote(answers: Sequence[str | None], answer_format: AnswerFormat) -> str | None:
    """Return the most common answer, spelled as it was first; None if none parsed."""
    spelled: dict[str | None, str] = {}
    keys = [answer_format.key(answer) for answer in answers if answer is not None]
    for key, answer in zip(keys, [answer for answer in answers if answer is not None], strict=True):
        spelled.setdefault(key, answer)
    return spelled[Counter(keys).most_common(1)[0][0]] if keys else None


def grade_answers(
    answers: Sequence[str | None], questions: Sequence[Question], answer_format: AnswerFormat
) -> Grades | None:
    """Grade answers of any kind; None if no answer is right. Raises DataError if there are no questions."""
    _refuse_none(questions)
    if answer_format.kind == "none":
        return None
    if answer_format.is_closed:
        return grade(answers, questions, labels=answer_format.labels)
    count = len(questions)
    right = sum(answered_right(answers, questions, answer_format))
    parsed = sum(answer is not None for answer in answers)
    return Grades(count, right / count, wilson_interval(right, count), parsed / count)


def _refuse_none(questions: Sequence[Question]) -> None:
    if not questions:
        raise DataError("There is no question to grade. Give a data file with at least one record.")


def grade(answers: Sequence[str | None], questions: Sequence[Question], *, labels: Sequence[str]) -> ClassGrades:
    """Grade labels: answers[i] against questions[i].label. Raises DataError if there are no questions."""
    _refuse_none(questions)
    count = len(questions)
    predicted = Counter(answer for answer in answers if answer is not None)
    actual = Counter(question.label for question in questions)
    hits = Counter(q.label for answer, q in zip(answers, questions, strict=True) if answer == q.label)
    classes = [label for label in labels if actual[label]]
    # F1 = 2 tp / (2 tp + fp + fn), and predicted + actual = 2 tp + fp + fn.
    f1 = [2 * hits[label] / (predicted[label] + actual[label]) for label in classes]
    baseline = max(actual.values()) / count
    return ClassGrades(
        count=count,
        accuracy=hits.total() / count,
        accuracy_interval=wilson_interval(hits.total(), count),
        macro_f1=sum(f1) / len(f1),
        recall={label: hits[label] / actual[label] for label in classes},
        well_formed=predicted.total() / count,
        majority_baseline=baseline,
        predicted={label: predicted[label] for label in labels},
        collapsed=baseline < COLLAPSED_SHARE and _is_one_sided(predicted),
    )


def small_sample(count: int, accuracy_interval: Sequence[float]) -> str:
    """Say what the interval of fewer than FEWEST_TO_COMPARE questions is worth; "" for more."""
    if count >= FEWEST_TO_COMPARE:
        return ""
    low, high = accuracy_interval
    questions = "1 question" if count == 1 else f"{count} questions"
    return (
        f"An evaluation of {questions} says little: its 95 % interval, {low:.0%} to {high:.0%}, is too wide to compare "
        f"models. Grade {FEWEST_TO_COMPARE} questions or more."
    )


def mcnemar(before_correct: Sequence[bool], after_correct: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test that the answers before and after are equally good.

    Only questions whose answer became right or wrong count; under the null hypothesis both are equally likely.
    """
    pairs = list(zip(before_correct, after_correct, strict=True))
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    changed = gained + lost
    at_least_as_extreme = sum(comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * at_least_as_extreme / 2**changed)


def _is_one_sided(predicted: Counter[str]) -> bool:
    parsed = predicted.total()
    return parsed >= FEWEST_TO_COLLAPSE and max(predicted.values()) >= COLLAPSED_SHARE * parsed
