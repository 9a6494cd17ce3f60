"""trainer_state.json: a run resumes from it, and transformers reads it as a TrainerState."""

import json
from dataclasses import asdict, replace

import pytest
from transformers import TrainerState

from grpo_ds.errors import CheckpointError
from grpo_ds.run_folder.inputs import BASE, PROMPTS, _hash, question_key
from grpo_ds.run_folder.progress import STATE_FILE, Progress, current_names
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import graded
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import Rewards

PROGRESS = Progress(
    max_steps=40, identity={"the questions": "5ec2"}, global_step=20, log_history=[{"step": 20, "reward": None}],
    reference_step=0, kl_floor=0.002, before={"5ec2": "yes"}, best_metric=0.75, best_global_step=10, bad_steps=[19],
    limits={"rows": 4.0}, trackers={"wandb": "abc123"}, changed_inputs=[{"step": 9, "inputs": ["the column gold"]}],
)  # fmt: skip


def test_what_was_written_is_read(tmp_path):
    PROGRESS.write(tmp_path)
    assert Progress.read(tmp_path) == PROGRESS


def test_transformers_reads_it_as_its_own(tmp_path):
    PROGRESS.write(tmp_path)
    state = TrainerState.load_from_json(str(tmp_path / STATE_FILE))
    assert (state.global_step, state.max_steps, state.log_history) == (20, 40, PROGRESS.log_history)
    assert (state.best_metric, state.best_global_step) == (0.75, 10)
    assert state.best_model_checkpoint == "checkpoint-10"


def test_a_state_of_the_first_version_is_read(tmp_path):
    (tmp_path / STATE_FILE).write_text(json.dumps(asdict(PROGRESS)))
    assert Progress.read(tmp_path) == PROGRESS


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"max_steps": 1, "total_flos": 2}', '{"stateful_callbacks": 3}'])
def test_what_is_none_of_ours_is_refused(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="is not a file that this version writes"):
        Progress.read(tmp_path)


def test_a_resumed_run_whose_prompts_have_changed_is_refused(tmp_path):
    progress = Progress(max_steps=9, global_step=3)
    progress.check_prompts([[1, 2], [3]])
    progress.write(tmp_path)
    Progress.read(tmp_path).check_prompts([[1, 2], [3]])
    for changed in ([[1, 2], [4]], [[1], [2, 3]], [[1, 2]]):
        with pytest.raises(
            CheckpointError, match=r"(?s)checkpoint-3 cannot be resumed: .*the prompts.*a version differs"
        ):
            Progress.read(tmp_path).check_prompts(changed)
        accepted = Progress.read(tmp_path)
        assert "the prompts" in str(accepted.check_prompts(changed, may_change=True))
        assert accepted.changes() == ["the token ids of the prompts, at step 3"]
        assert accepted.check_prompts(changed) is None  # it is the run's own now


def test_a_run_that_continues_with_changed_inputs_notes_them_and_compares_with_them_later():
    progress = Progress(max_steps=9, identity={"a": "1", "b": "1", "gone": "1", PROMPTS: "7"}, global_step=3)
    progress.continue_with({"a": "1", "b": "2"})
    assert progress.changes() == ["b, at step 3", "gone, at step 3"]
    progress.global_step = 5
    progress.continue_with({"a": "1", "b": "2"})
    assert len(progress.changes()) == 2 and progress.identity == {"a": "1", "b": "2", PROMPTS: "7"}


def test_another_base_is_never_accepted():
    progress = Progress(max_steps=9, global_step=3)
    progress.check_late(BASE, "1", may_change=False)
    with pytest.raises(CheckpointError, match="the weights of the base model changed"):
        progress.check_late(BASE, "2", may_change=True)


def test_held_out_answers_before_training_are_found_for_the_questions_of_now():
    one, two, three = (Question(str(i), f"Is it {i}?", "", "yes") for i in range(3))
    progress = Progress(max_steps=9)
    progress.keep_before([one, two], graded(["yes", "no"], [one, two], AnswerFormat()))
    assert progress.answered_before([three, two]) == {two: "no"}
    assert progress.answered_before([replace(one, text="Is it another?")]) == {}
    progress.before = ["yes", "no"]  # of an older version: in the order of the questions
    assert progress.answered_before([one, two]) == {one: "yes", two: "no"}
    assert progress.answered_before([one, two, three]) == {}


def test_rewards_before_training_are_kept_if_they_are_the_grade():
    none = AnswerFormat(kind="none")
    asked = [Question(str(i), f"Write {i}.", "", "") for i in range(2)]
    rewards = Rewards([1.5, 0.0], {"brief": [1.0, 0.0], "cites": [0.5, None]})
    before, progress = graded(["a", "b"], asked, none).rewarded(rewards), Progress(max_steps=9)
    progress.keep_before(asked, before)
    progress = Progress(max_steps=9, before=progress.before, before_more=json.loads(json.dumps(progress.before_more)))
    assert progress.evaluation_before(progress.answered_before(asked), none) == before
    other = Question("2", "Write 2.", "", "")
    progress.before[question_key(other)] = "c"  # its rewards are not known
    assert progress.evaluation_before(progress.answered_before([*asked, other]), none).earned is None


def test_questions_of_before_other_answers_existed_keep_their_key():
    asked = Question("1", "Is it?", "", "yes")
    assert question_key(asked) == _hash(["1", "Is it?", "", "yes"])
    others = [
        replace(asked, accepted=("yes", "aye")),
        replace(asked, messages=({"role": "user", "content": "Is it?"},)),
    ]
    assert len({question_key(question) for question in (asked, *others)}) == 3


OLDER = {
    "step": 3, "reward": 0.5, "rewards/format": 0.25, "completion_length": 40.0, "ended": 0.75, "clip_ratio/low": 0.1,
    "clip_ratio/high": 0.2, "clip_fraction": 0.3, "kl": 0.01,
}  # fmt: skip
NOW = {
    "step": 3, "reward": 0.5, "rewards/format/mean": 0.25, "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.25, "clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2,
    "clip_ratio/region_mean": 0.3, "kl": 0.01,
}  # fmt: skip


def test_metrics_of_an_older_version_are_read_under_trls_names(tmp_path):
    Progress(max_steps=9, global_step=3, log_history=[OLDER, {"step": 3, "eval/accuracy": 0.5}]).write(tmp_path)
    assert Progress.read(tmp_path).log_history == [NOW, {"step": 3, "eval/accuracy": 0.5}]
    assert current_names(NOW) == NOW
