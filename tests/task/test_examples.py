"""Examples in the docstrings of the data classes that cross stages are right."""

import pytest

from grpo_ds.task.answers import AnswerFormat, ParsedAnswer
from grpo_ds.task.chat import Chat
from grpo_ds.task.grading import Evaluation, Grades
from grpo_ds.task.prompts import EncodedPrompt
from grpo_ds.task.questions import Question, QuestionSet
from grpo_ds.task.rewards import OwnReward
from grpo_ds.task.scoring import Rewards
from grpo_ds.task.sources import Source
from tests.conftest import check_example

CLASSES = [AnswerFormat, Chat, EncodedPrompt, Evaluation, Grades, OwnReward, ParsedAnswer, Question, QuestionSet]
CLASSES += [Rewards, Source]


@pytest.mark.parametrize("cls", CLASSES)
def test_the_example_of_a_data_class_is_right(cls):
    check_example(cls)
