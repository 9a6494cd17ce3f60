"""Worked examples for --few_shot: two questions of each kind of answer, with a reasoning. No data set holds them.

The reasoning of a small model copies the examples' subject, so biomedical ones are for biomedical data alone.
"""

from dataclasses import replace

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question

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
    """Return the examples whose answer is allowed, spelled as the labels are; their number is that of any subject."""
    if not answer_format.is_closed:
        return list({"number": NUMBERS, "text": TEXTS}.get(answer_format.kind, ()))
    examples = IN_BIOMEDICINE if subject == BIOMEDICAL else YES_OR_NO
    spelled = [(replace(q, label=answer_format.label_of(q.label) or ""), reasoning) for q, reasoning in examples]
    return [example for example in spelled if example[0].label]
