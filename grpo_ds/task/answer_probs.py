"""Probabilities of the labels: how much a model believes in the right one, instead of only whether it said it.

An answer is one of a few labels, so a model has a probability for each at the place of the answer. Their mean says more
than the same number of answers right or wrong: an answer changes only where a probability crosses a half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ds.task.questions import Question
from grpo_ds.task.statistics import auc, bootstrap_interval, calibration_error, mean, paired_change


@dataclass(frozen=True, slots=True)
class AnswerProbs:
    """Probabilities of the labels as the answer to one question, in the order of the labels; they sum to 1.

    Example: the model reasons its way to "yes", which it would not say at once.
        >>> AnswerProbs(reasoned=(0.9, 0.1), empty=(0.4, 0.6)).answer
        (0.9, 0.1)
    """

    reasoned: tuple[float, ...] | None  # after the model's own greedy reasoning; None: that is not in form
    empty: tuple[float, ...]  # after an empty reasoning
    misled: tuple[float, ...] | None = None  # after a reasoning that claims a wrong label; None: not asked for

    @property
    def answer(self) -> tuple[float, ...]:
        """After its own reasoning, or after an empty one where the model does not keep to the form.

        So every question counts, before training as after it, and a model gains nothing here by its form alone.
        """
        return self.reasoned or self.empty


@dataclass(frozen=True, slots=True)
class Confidence:
    """Figures of the label probabilities of all questions; intervals are of 95 %, dicts by label.

    Example: one question of each class; the second is answered out of form.
        >>> questions = [Question("1", "Is it?", "", "yes"), Question("2", "Was it?", "", "no")]
        >>> probs = [AnswerProbs((0.9, 0.1), (0.5, 0.5)), AnswerProbs(None, (0.75, 0.25))]
        >>> found = confidence(probs, questions, labels=("yes", "no"))
        >>> found.mean_p_right, found.lean, found.reasoning_gain
        (0.575, {'yes': 0.825, 'no': 0.175}, 0.4)
    """

    mean_p_right: float
    mean_p_right_interval: tuple[float, float]
    mean_p_right_empty: float  # after an empty reasoning, of all questions
    reasoned: float  # share of questions with a probability after the model's own reasoning
    reasoning_gain: float | None  # mean over these: p(right) after its own reasoning less p(right) after an empty one
    reasoning_gain_interval: tuple[float, float] | None
    lean: dict[str, float]  # mean probability
    class_shares: dict[str, float]  # share of questions with this label, to compare the lean with
    auc: float | None  # how well p separates two labels, whatever the lean; None: other than two labels, or one missing
    auc_interval: tuple[float, float] | None
    calibration_error: float  # of the most likely label's probability
    misled_accuracy: float | None  # share of questions whose right label is the most likely one even if misled


def confidence(probs: Sequence[AnswerProbs], questions: Sequence[Question], *, labels: Sequence[str]) -> Confidence:
    """Compute the figures of probs[i] for questions[i]."""
    answers, actual = [it.answer for it in probs], [question.label for question in questions]
    right, gains = p_right(probs, questions, labels=labels), _known(reasoning_gains(probs, questions, labels=labels))
    area, area_interval = _auc(answers, actual, labels)
    said, misled = [_likely(p, labels) for p in answers], [it.misled for it in probs if it.misled]
    return Confidence(
        mean_p_right=mean(right),
        mean_p_right_interval=bootstrap_interval(right),
        mean_p_right_empty=mean([it.empty[labels.index(label)] for it, label in zip(probs, actual, strict=True)]),
        reasoned=len(gains) / len(probs),
        reasoning_gain=mean(gains) if gains else None,
        reasoning_gain_interval=bootstrap_interval(gains) if gains else None,
        lean={label: mean([p[i] for p in answers]) for i, label in enumerate(labels)},
        class_shares={label: actual.count(label) / len(actual) for label in labels},
        auc=area,
        auc_interval=area_interval,
        calibration_error=calibration_error(
            [max(p) for p in answers], [a == b for a, b in zip(said, actual, strict=True)]
        ),
        misled_accuracy=(
            mean([_likely(p, labels) == label for p, label in zip(misled, actual, strict=True)]) if misled else None
        ),
    )


def p_right(probs: Sequence[AnswerProbs], questions: Sequence[Question], *, labels: Sequence[str]) -> list[float]:
    """Return the probability of each question's right label."""
    return [it.answer[labels.index(question.label)] for it, question in zip(probs, questions, strict=True)]


def reasoning_gains(
    probs: Sequence[AnswerProbs], questions: Sequence[Question], *, labels: Sequence[str]
) -> list[float | None]:
    """Return what each question's own reasoning adds to p(right); None where it is out of form."""
    places = [labels.index(question.label) for question in questions]
    return [it.reasoned[i] - it.empty[i] if it.reasoned else None for it, i in zip(probs, places, strict=True)]


def compare_p_right(before: Sequence[float], after: Sequence[float]) -> dict[str, float | tuple[float, float]]:
    """Return the mean change of p(right) on the same questions, its interval, and the p-value of no change."""
    change, interval, p_value = paired_change(before, after)
    return {"p_right_change": change, "p_right_change_interval": interval, "p_right_p_value": p_value}


def wrong_label(right: str, labels: Sequence[str]) -> int:
    """Return the index of the wrong label that a misleading reasoning claims: the one behind the right label."""
    return (labels.index(right) + 1) % len(labels)


def _auc(
    probs: Sequence[tuple[float, ...]], actual: Sequence[str], labels: Sequence[str]
) -> tuple[float, tuple[float, float]] | tuple[None, None]:
    if len(labels) != 2 or len(set(actual)) < 2:
        return None, None
    first, second = ([p[0] for p, label in zip(probs, actual, strict=True) if label == one] for one in labels)
    return auc(first, second)


def _likely(probs: Sequence[float], labels: Sequence[str]) -> str:
    return labels[probs.index(max(probs))]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
