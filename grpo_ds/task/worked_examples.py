"""Worked examples for --few_shot: two questions of each kind of answer, with a reasoning. No data set holds them.

The reasoning of a small model copies the examples' subject, so biomedical ones are for biomedical data alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.spelling import label_key

# Labels that mean yes, and no.
YES_WORDS = frozenset(("yes", "true", "ja", "oui", "sí", "si", "sim", "tak", "да", "是", "はい"))
NO_WORDS = frozenset(("no", "false", "nein", "nee", "nej", "non", "não", "nao", "nie", "нет", "否", "いいえ"))

BIOMEDICAL = "biomedical"  # subject of PubMedQA and of the packaged questions
WorkedExample = tuple[Question, str]  # with its reasoning

IN_BIOMEDICINE: tuple[WorkedExample, ...] = (
    (
        Question(
            id="worked-example-yes",
            text="Does hand washing by ward staff reduce the spread of intestinal infections?",
            context="Two wards were compared for a year. The ward with a hand-washing programme had 4 infections "
            "in 400 patients, the other 21 in 410 (p < 0.01).",
            label="yes",
        ),
        "Infections were five times rarer in the ward with the programme, and the difference is significant.",
    ),
    (
        Question(
            id="worked-example-no",
            text="Does an evening glass of water shorten the common cold?",
            context="In a trial of 300 adults, colds lasted 7.1 days with an evening glass of water and 7.0 days "
            "without it (p = 0.81).",
            label="no",
        ),
        "The colds lasted equally long in both groups, and the difference is not significant.",
    ),
)
YES_OR_NO: tuple[WorkedExample, ...] = (
    (
        Question(
            id="worked-example-yes",
            text="Can the ferry to the island carry a car?",
            context="The ferry to the island leaves every two hours. Its lower deck has room for twelve cars.",
            label="yes",
        ),
        "The lower deck of the ferry has room for twelve cars, so one car fits.",
    ),
    (
        Question(
            id="worked-example-no",
            text="Is the museum open on Mondays?",
            context="The museum opens at ten from Tuesday to Sunday. On Mondays its rooms are cleaned.",
            label="no",
        ),
        "The museum opens from Tuesday to Sunday only, and Monday is not among these days.",
    ),
)
NUMBERS: tuple[WorkedExample, ...] = (
    (
        Question(
            id="worked-example-number-1",
            text="A box holds 12 eggs. A baker uses 3 boxes and 5 more eggs. How many eggs does she use?",
            context="",
            label="41",
        ),
        "3 boxes hold 3 x 12 = 36 eggs. With 5 more these are 36 + 5 = 41.",
    ),
    (
        Question(
            id="worked-example-number-2",
            text="A ticket costs 8 coins, and children pay half. What do 2 adults and 3 children pay together?",
            context="",
            label="28",
        ),
        "2 adults pay 2 x 8 = 16. A child pays 8 / 2 = 4, so 3 children pay 12. Together 16 + 12 = 28.",
    ),
)
TEXTS: tuple[WorkedExample, ...] = (
    (
        Question(
            id="worked-example-text-1",
            text="Which planet is nearest to the sun?",
            context="Mercury circles the sun once in 88 days. No other planet is nearer to the sun.",
            label="Mercury",
        ),
        "No planet is nearer to the sun than Mercury.",
    ),
    (
        Question(
            id="worked-example-text-2",
            text="What do bees make from nectar?",
            context="Bees collect nectar from flowers. In the hive they turn it into honey.",
            label="honey",
        ),
        "Bees collect nectar and turn it into honey.",
    ),
)


def worked_examples(answer_format: AnswerFormat, subject: str = "") -> list[WorkedExample]:
    """Return two examples of this kind of answer, or none; their number is that of any subject."""
    if not answer_format.is_closed:
        return list({"number": NUMBERS, "text": TEXTS}.get(answer_format.kind, ()))
    labels = answer_format.labels
    if not (meant := _yes_and_no(labels)):
        return _of_any_labels(labels[0], labels[-1])
    examples = IN_BIOMEDICINE if subject == BIOMEDICAL else YES_OR_NO
    return [(replace(example, label=meant[example.label]), reasoning) for example, reasoning in examples]


def _yes_and_no(labels: Sequence[str]) -> dict[str, str]:
    """Return the labels that mean yes and no; {} unless both are there. 1 and 0 mean it only if there are no others."""
    numbers = ("1", "0") if len(labels) == 2 else ("", "")
    meant = (("yes", {*YES_WORDS, numbers[0]}), ("no", {*NO_WORDS, numbers[1]}))
    found = {meaning: label for label in labels for meaning, words in meant if label_key(label) in words}
    return found if len(found) == len(meant) else {}


def _of_any_labels(first: str, last: str) -> list[WorkedExample]:
    """Return examples whose contexts name the answer, so that they show the form alone."""
    quiz = Question(
        id="worked-example-label-1",
        text="What was the answer to the first question of the quiz?",
        context=f"The answers were read out after the quiz. The first was {first}, the second {last}.",
        label=first,
    )
    form = Question(
        id="worked-example-label-2",
        text="Which box of the form did the visitor tick?",
        context=f"The form has a box for each answer. The visitor ticked the box behind {last}.",
        label=last,
    )
    read_out = f"The first answer that was read out is {first}."
    return [(quiz, read_out), (form, f"The tick of the visitor stands behind {last}.")]
