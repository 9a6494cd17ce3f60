"""Which checkpoint a run goes on from, and with which flags. Nothing heavy: it is known before a model is loaded."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.errors import CheckpointError, one_error
from grpo_ds.run_folder.checkpoints import run_of, to_resume
from grpo_ds.run_folder.lock import take
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import CONFIG_FILE, SYSTEM_PROMPT_FILE, TrainConfig
from grpo_ds.settings.ds_config import DsConfig

# Flags that decide no number of a run, or are compared by what they lead to (progress.py: data, ds, prompt).
MAY_CHANGE = {
    *("data", "ds", "eval_limit", "system_prompt", "output_dir", "num_steps", "save_steps", "save_total_limit"),
    *(
        "eval_steps",
        "resume_from_checkpoint",
        "plan",
        "dry_run_worst_case",
        "oom_retry",
        "report_to",
        "merge_adapter",
        "log_completions",
    ),
    *("generation_batch_size", "pack_tokens", "logprob_chunk_mib", "gradient_checkpointing", "cuda_graphs"),
    *("reward_timeout", "on_reward_error", "trust_remote_code", "preflight", "max_bad_steps"),
}


def find_checkpoint(config: TrainConfig) -> tuple[Path, list[str]]:
    """What --resume_from_checkpoint means, verified, and what to tell. Raises CheckpointError."""
    run, asked = (
        Path(os.path.expanduser(config.output_dir)) if config.output_dir else None,
        str(config.resume_from_checkpoint),
    )
    there = run_of(asked, run)
    first = os.environ.get("RANK", "0") == "0"
    branches = run is not None and there is not None and run.resolve() != there.resolve()  # into another folder
    if there is not None and there.is_dir() and first and not branches and not config.plan:
        take(there)
    return to_resume(asked, run)


def flags_of(checkpoint: Path) -> dict[str, Any]:
    """The flags it was made with."""
    file = checkpoint / CONFIG_FILE
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}).") from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} holds no settings.")
    if saved.get("system_prompt"):  # the run's copy, which stays when checkpoints go
        copies = [folder / SYSTEM_PROMPT_FILE for folder in (checkpoint.parent, checkpoint)]
        saved["system_prompt"] = str(next((copy for copy in copies if copy.is_file()), copies[0]))
    # Whose code may run here is for the person to say, not for a file.
    others = {"resume_from_checkpoint", "plan", "output_dir", "trust_remote_code"}
    known = {knob.name for knob in fields(TrainConfig)} - others
    return {name: value for name, value in saved.items() if name in known}


def refuse_other_flags(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises CheckpointError where the flags would make another run of it."""
    same = MAY_CHANGE - ({"num_steps"} if config.num_iterations > 1 else set())  # it says where references are remade
    changed = [
        f"--{name} is {getattr(config, name)}, but was {value}"
        for name, value in saved.items()
        if name not in same and getattr(config, name) != value
    ]
    if changed:
        raise one_error(
            CheckpointError,
            f"{checkpoint} cannot be resumed with other settings:",
            changed,
            f"Leave them out, or train on from its weights: --model {checkpoint} --output_dir ANOTHER",
        )


def check_complete(checkpoint: Path, progress: Progress, config: TrainConfig, ds: DsConfig, ranks: int) -> None:
    """Raises CheckpointError where something was never saved that a resume would have to do without."""
    shards = f"global_step{progress.global_step}"
    wanted = {
        "*.safetensors": 1,
        "rank*.pt": ranks,
        f"{shards}/*model_states.pt": 1,
        f"{shards}/*optim_states.pt": ranks if ds.zero_stage else 0,
        "reference.pt": int(config.beta > 0 and progress.reference_step is not None),
    }
    if lacking := [name for name, count in wanted.items() if len(list(checkpoint.glob(name))) < count]:
        raise CheckpointError(
            f"{checkpoint} lacks {', '.join(lacking)}, so it cannot be resumed; name an older one of the run.\n"
            f"To train on from its weights alone: --model {checkpoint} --output_dir ANOTHER"
        )
