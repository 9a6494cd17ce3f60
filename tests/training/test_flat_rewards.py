"""A run that learns nothing for some steps says so once, with what was wrong with its completions."""

import pytest
import torch

from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.flat_rewards import FLAT_STEPS, flat_rewards
from grpo_ds.training.rollout import Rollout
from grpo_ds.training.sampling import Completions

FORMAT = AnswerFormat(("yes", "no"))
GOOD = FORMAT.write("It fell by half.", "yes")
TEXTS = ["yes", "yes.", f"{GOOD} Done.", "<reasoning>It", GOOD, GOOD.replace("yes", "no")]
FLAT = {"reward": 0.0, "frac_reward_zero_std": 1.0, "well_formed": 0.2, "rewards/correctness/mean": 0.0}
ILL_FORMED = {**FLAT, "frac_reward_zero_std": 0.0, "well_formed": 0.0}
LEARNS = {**FLAT, "frac_reward_zero_std": 0.5}
EVALUATION = {"eval/accuracy": 0.5}
OTHER_REWARDS = {name: value for name, value in ILL_FORMED.items() if "correctness" not in name}


def rollout():
    zeros = torch.zeros(len(TEXTS), 1)
    ended = torch.tensor([True, True, True, False, True, True])
    return Rollout(
        [Question("1", "Did it fall?", "", "yes")],
        [torch.tensor([1])],
        Completions(zeros.long(), zeros.bool(), ended),
        TEXTS,
        Rewards([0.0] * len(TEXTS), {}),
        None,
        zeros[:, 0],
        zeros.bool(),
        zeros,
    )


HISTORIES = [  # metrics of the steps so far, words of the warning (None: no warning)
    ([FLAT] * (FLAT_STEPS - 1), None),
    ([FLAT] * FLAT_STEPS, "earned the same (mean reward 0.00)"),
    ([{**FLAT, "reward": 2.4}] * FLAT_STEPS, "earned the same (mean reward 2.40)"),  # equal, but not 0
    ([ILL_FORMED] * FLAT_STEPS, "no completion had the form of an answer"),
    ([ILL_FORMED, FLAT] * FLAT_STEPS, None),  # said before
    ([OTHER_REWARDS] * FLAT_STEPS, None),  # rewards that do not ask for the form
    ([*[FLAT] * 2, EVALUATION, *[FLAT] * (FLAT_STEPS - 2)], "earned the same"),
    ([*[FLAT] * (FLAT_STEPS - 1), LEARNS, FLAT], None),
    ([*[FLAT] * FLAT_STEPS, LEARNS], None),
    ([LEARNS, *[FLAT] * FLAT_STEPS], "earned the same"),
    ([*[FLAT] * FLAT_STEPS, LEARNS, *[FLAT] * FLAT_STEPS], None),  # once
    ([{"reward": 0.0}] * FLAT_STEPS, None),  # steps of an older version
]


@pytest.mark.parametrize(("steps", "words"), HISTORIES)
def test_the_warning_comes_once_after_some_flat_steps(steps, words):
    warning = flat_rewards(steps, rollout(), FORMAT)
    assert bool(warning) == (words is not None) and (words or "") in warning


def test_it_counts_what_was_wrong():
    warning = flat_rewards([FLAT] * FLAT_STEPS, rollout(), FORMAT)
    assert warning.splitlines()[1] == (
        "The last 6 completions: 2 x no tags; 1 x text after the answer; 1 x cut at --max_completion_length; "
        "1 x right; 1 x well-formed, but wrong."
    )


def test_a_run_says_it_once(tiny_folder):
    from tests.training.test_training import tiny_trainer

    trainer, train, _ = tiny_trainer(tiny_folder, num_generations=2, num_steps=FLAT_STEPS + 1, learning_rate=1e-6)
    trainer.collector.score.keywords["functions"]["letters"] = (lambda completions, **_: [0.0] * len(completions), 1.0)
    said: list[str] = []
    trainer.console.line = said.append
    for metrics in trainer.steps(train):
        trainer.progress.log_history.append({"step": trainer.progress.global_step, **metrics})
    (warning,) = [line for line in said if line.startswith("Warning: for")]
    assert "4 x cut at --max_completion_length" in warning or "no tags" in warning
    trainer.engine.close()
