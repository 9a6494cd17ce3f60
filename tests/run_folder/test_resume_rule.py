"""Flags typed when resuming are checked with the checkpoint's other flags, and those that may not change are named."""

import json
import re
import shutil

import pytest

from grpo_ds.commands.settle import settle
from grpo_ds.errors import MAX_LINES, CheckpointError, GrpoError, UsageError
from grpo_ds.run_folder import checkpoints
from grpo_ds.run_folder.inputs import BASE, REWARDS
from grpo_ds.run_folder.lock import LOCK_FILE
from grpo_ds.run_folder.progress import Progress
from grpo_ds.run_folder.resume import MAY_CHANGE, check_steps
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config

pytestmark = pytest.mark.faults("flags that change at a resume")

SHAPE = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 272,
    "num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Return saved(**flags): makes a run's folder with a checkpoint of step 3, with all that `settle` reads of it."""

    def save(**flags):
        config = TrainConfig(**{"data": "sample", "model": str(tmp_path / "gone"), **flags})
        partial = checkpoints.partial_of(tmp_path / "run", 3)
        checkpoints.begin(partial)
        write_config(config, partial)
        Progress(9, {BASE: "b", REWARDS: "r"} if config.lora_r else {}, global_step=3).write(partial)
        (partial / "config.json").write_text(json.dumps(SHAPE))
        return str(checkpoints.finish(partial))

    return save


SHORT = {"max_prompt_length": 200, "max_completion_length": 50}
# (flags of the checkpoint, typed flags, the error: its type and words; None: accepted). Alone, with the default
# values of the others, each typed flag would be judged the other way round.
TYPED = [
    ({"lora_r": 4, "model": "smollm2-135m"}, "--merge_adapter true", None),
    ({"save_steps": 3}, "--eval_steps 3", None),
    (SHORT, "--pack_tokens 500", None),
    ({"labels": "A,B,C,D"}, "--num_steps 200", None),
    ({"num_steps": 40, "eval_limit": 4}, "--eval_limit 9 --save_steps 7", None),
    ({}, "--merge_adapter true", (UsageError, ["merge_adapter is for an adapter", "in a resumed run", "all param"])),
    ({}, "--load_in_8bit true", (CheckpointError, ["--load_in_8bit is True, but was False"])),
    ({}, "--sync_ref_model true", (CheckpointError, ["--sync_ref_model is True, but was False"])),
    ({}, "--lora_r 16 --merge_adapter true", (CheckpointError, ["--lora_r is 16, but was 0"])),
    ({"save_steps": 4}, "--eval_steps 5", (UsageError, ["save_steps is 4", "multiple of eval_steps, 5"])),
    ({"max_prompt_length": 2000}, "--pack_tokens 1500", (UsageError, ["pack_tokens is 1500", "2299"])),
    (SHORT, "--pack_tokens 500 --beta 0.5", (CheckpointError, ["--beta is 0.5, but was 0.04"])),
    ({"num_iterations": 2}, "--num_steps 200", (CheckpointError, ["--num_steps is 200, but was 100"])),
    ({}, "--max_steps 200", None),
    (
        {"lr_scheduler_type": "linear"},
        "--max_steps 200",
        (CheckpointError, ["--num_steps is 200, but was 100"]),
    ),
    ({"warmup_ratio": 0.1}, "--num_train_epochs 2", (CheckpointError, ["--num_train_epochs is 2.0, but was None"])),
    ({}, "--model elsewhere", (CheckpointError, ["--model is elsewhere, but was"])),
    ({}, "--reward_funcs format", (CheckpointError, ["--reward_funcs is format"])),  # of an older version
]


@pytest.mark.parametrize(("flags", "words", "refused"), TYPED)
def test_typed_flags_are_checked_on_top_of_the_checkpoints(saved, flags, words, refused):
    argv = ["--resume_from_checkpoint", saved(**flags), *words.split()]
    if refused is None:
        config = settle(argv).config
        assert all(getattr(config, name) == value for name, value in flags.items() if f"--{name}" not in words)
        return
    with pytest.raises(GrpoError) as error:
        settle(argv)
    assert type(error.value) is refused[0] and all(word in str(error.value) for word in refused[1]), error.value
    unchangeable = re.findall(r"(?:add|:) --(\w+) ", str(error.value).partition("Leave them out")[0])
    assert not {*unchangeable} - MAY_CHANGE, error.value  # no remedy that the same run refuses


def test_a_link_to_a_checkpoint_is_the_checkpoint(saved, tmp_path):
    (tmp_path / "best").symlink_to(checkpoint := saved())
    assert str(settle(["--resume_from_checkpoint", str(tmp_path / "best")]).resume_from) == checkpoint


def test_a_checkpoint_under_another_name_is_told_its_name(saved, tmp_path):
    shutil.move(saved(), best := tmp_path / "run" / "best")
    with pytest.raises(CheckpointError, match=r"under another name(.|\n)*Rename it to checkpoint-3"):
        settle(["--resume_from_checkpoint", str(best)])
    assert not (best / LOCK_FILE).exists()


def test_the_shape_of_a_full_model_comes_from_its_checkpoint(saved):
    settled = settle(["--resume_from_checkpoint", saved()])
    assert settled.job.shape.hidden == 64 and settled.job.shape.name.endswith("gone")


def test_a_checkpoint_of_an_adapter_says_which_base_it_needs(saved, tmp_path):
    checkpoint = saved(lora_r=4)
    with pytest.raises(CheckpointError) as error:
        settle(["--resume_from_checkpoint", checkpoint])
    words = (f"{checkpoint} holds an adapter on {tmp_path / 'gone'}", "cannot be read", "--model FOLDER")
    assert all(word in str(error.value) for word in words) and len(str(error.value).splitlines()) <= MAX_LINES
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text(json.dumps(SHAPE))
    settle(["--resume_from_checkpoint", checkpoint, "--model", str(tmp_path / "there")])


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    progress = Progress(9, global_step=3)
    for steps in (3, 4):
        check_steps(tmp_path, progress, TrainConfig(num_steps=steps))
    with pytest.raises(CheckpointError, match=r"--num_steps 2 is less than the 3 steps that .* has done"):
        check_steps(tmp_path, progress, TrainConfig(num_steps=2))


def test_a_changed_input_is_accepted_for_one_resumption_only(saved):
    checkpoint = saved(resume_from_checkpoint="earlier", resume_changed_inputs=True)
    assert settle(["--resume_from_checkpoint", checkpoint, "--resume_changed_inputs"]).config.resume_changed_inputs
    assert not settle(["--resume_from_checkpoint", checkpoint]).config.resume_changed_inputs
    with pytest.raises(UsageError, match="resume_changed_inputs is for a resumed run"):
        settle(["--resume_changed_inputs", "--data", "sample"])
