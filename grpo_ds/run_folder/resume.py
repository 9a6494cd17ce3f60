"""The resume rule: the checkpoint a run resumes from, and the flags it may change. No torch: checked before loading."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from grpo_ds.errors import CheckpointError, one_error
from grpo_ds.run_folder.checkpoints import MANIFEST, damage, folder_of, found_in, step_of, tidy
from grpo_ds.run_folder.inputs import BASE, REWARDS
from grpo_ds.run_folder.lock import lock
from grpo_ds.run_folder.progress import Progress
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.config_file import read_settings
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.settings.saved_config import CONFIG_FILE, OF_ONE_RUN, with_copied_prompt

# Flags that change no number of a run beyond rounding, or whose effect is compared instead (inputs.py: data, ds,
# system_prompt, pack_tokens).
MAY_CHANGE = {
    *(
        "data",
        "ds",
        "eval_limit",
        "eval_samples",
        "system_prompt",
        "output_dir",
        "num_steps",
        "max_steps",
        "num_train_epochs",
        "save_steps",
        "save_total_limit",
    ),
    *(
        "eval_steps",
        "resume_from_checkpoint",
        "resume_changed_inputs",
        "plan",
        "gpu_gib",
        "ram_gib",
        "dry_run_worst_case",
        "oom_retry",
        "report_to",
        "merge_adapter",
        "log_completions",
    ),
    *("generation_batch_size", "pack_tokens", "logprob_chunk_mib", "gradient_checkpointing", "cuda_graphs"),
    *("reward_timeout", "on_reward_error", "trust_remote_code", "preflight", "max_bad_steps", "full_determinism"),
}
# Flags that may name another place, if the checkpoint has this hash.
COMPARED = {"model": BASE, "reward_funcs": REWARDS}


def find_checkpoint(config: TrainConfig) -> tuple[Path, list[str]]:
    """Return the verified checkpoint for --resume_from_checkpoint, and warnings. Raises CheckpointError."""
    run, asked = (
        Path(os.path.expanduser(config.output_dir)) if config.output_dir else None,
        str(config.resume_from_checkpoint),
    )
    there = run_of(asked, run)
    first = os.environ.get("RANK", "0") == "0"
    branches = run is not None and there is not None and run.resolve() != there.resolve()  # into another folder
    if there is not None and there.is_dir() and first and not branches and not config.plan:
        lock(there)
    return to_resume(asked, run)


def to_resume(asked: str, run: Path | None) -> tuple[Path, list[str]]:
    """Return the checkpoint to resume from, and warnings about damaged ones that were skipped.

    asked: "auto" (the newest complete one of `run`), a folder checkpoint-N or a link to it (or the newest complete one
    before it), or a run's folder. Raises CheckpointError if there is none: a resumed run never starts from the
    beginning.
    """
    named = None if asked == "auto" else _named(asked)
    run = run_of(asked, run)
    if run is None:
        raise CheckpointError("--resume_from_checkpoint auto needs the folder of the run: add --output_dir FOLDER.")
    tidy(run)
    if named and not named.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {asked}: no such folder.{_others(run)}")
    newest = step_of(named) if named and step_of(named) >= 0 else math.inf
    candidates = [checkpoint for checkpoint in found_in(run) if step_of(checkpoint) <= newest]
    warnings: list[str] = []
    for candidate in candidates:
        if (wrong := damage(candidate)) is None:
            return candidate, warnings
        warnings.append(f"{candidate} is damaged: {wrong}")
    none = f"{run} holds no checkpoint" if not warnings else "No complete checkpoint is left"
    start = "To start from the beginning, leave --resume_from_checkpoint out and name another --output_dir."
    raise CheckpointError("\n".join([f"{none}, so nothing can be resumed.", *warnings[:3], start]))


def run_of(asked: str, run: Path | None) -> Path | None:
    """Return the run's folder that --resume_from_checkpoint names; `run` is --output_dir."""
    if asked == "auto":
        return run
    named = _named(asked)
    return named.parent if step_of(named) >= 0 else named


def _named(asked: str) -> Path:
    """Return the folder that --resume_from_checkpoint names. Raises CheckpointError for a renamed checkpoint."""
    named = Path(os.path.expanduser(asked))
    if step_of(named) < 0 and step_of(named.resolve()) >= 0:
        return named.resolve()
    if step_of(named) < 0 and (named / MANIFEST).is_file():
        name = folder_of(named.parent, Progress.read(named).global_step).name
        raise CheckpointError(
            f"{named} is a checkpoint under another name, and a run is resumed from a folder of the first name only.\n"
            f"Rename it to {name}, in its own folder or in the run's, and name that."
        )
    return named


def _others(run: Path) -> str:
    names = ", ".join(path.name for path in found_in(run)[:5])
    return f" Checkpoints in {run}: {names}." if names else ""


def flags_of(checkpoint: Path) -> dict[str, Any]:
    """Return the flags that the checkpoint was made with."""
    file = checkpoint / CONFIG_FILE
    # Only the user may allow code to run, not a file.
    others = {*OF_ONE_RUN, "trust_remote_code"}
    known = [flag for flag in fields(TrainConfig) if flag.name not in others]
    saved, problems = read_settings(file, known, strict=False)
    if problems:
        raise one_error(CheckpointError, f"{file} cannot be used:", problems)
    return with_copied_prompt(saved, file)


def refuse_other_flags(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError if the flags would change the numbers of the run."""
    # With several iterations it sets the outer loop, with a schedule the learning rate.
    length_decides = config.num_iterations > 1 or config.depends_on_length
    same = MAY_CHANGE - ({"num_steps", "num_train_epochs"} if length_decides else set())
    known = Progress.read(checkpoint).identity
    same |= {flag for flag, compared in COMPARED.items() if compared in known}
    depends = "the outer loop depends" if config.num_iterations > 1 else "the learning rate depends"
    why = {"num_steps": f": {depends} on it"}
    changed = [
        f"--{name} is {getattr(config, name)}, but was {value}{why.get(name, '')}"
        for name, value in saved.items()
        if name not in same and getattr(config, name) != value
    ]
    if changed:
        raise one_error(
            CheckpointError,
            f"{checkpoint} cannot be resumed with other settings:",
            changed,
            f"Leave them out, or train further from its weights: --model {checkpoint} --output_dir ANOTHER",
        )


def weights_of(config: TrainConfig, checkpoint: Path | None) -> str:
    """Return the model whose weights a run loads: a checkpoint holds them, but with LoRA only the adapter's."""
    return config.model if checkpoint is None or config.lora_r else str(checkpoint)


def base_needed(checkpoint: Path, base: str, error: Exception) -> CheckpointError:
    """Return the error for an adapter's checkpoint whose base cannot be read."""
    return CheckpointError(
        f"{checkpoint} holds an adapter on {base}, and this base cannot be read:\n"
        f"  {str(error).splitlines()[0][:200]}\n"
        "If it was moved, add --model FOLDER; its weights are compared with those that the run began with."
    )


def check_steps(checkpoint: Path, progress: Progress, config: TrainConfig) -> None:
    """Raise CheckpointError if the run has done more steps than are asked for."""
    if config.total_steps < (done := progress.global_step):
        raise CheckpointError(
            f"--num_steps {config.num_steps} is less than the {done} steps that {checkpoint} has done.\n"
            f"Leave it out, or ask for more than {done}."
        )


def check_complete(checkpoint: Path, progress: Progress, config: TrainConfig, ds: DsConfig, ranks: int) -> None:
    """Raise CheckpointError if a file that resuming needs was never saved."""
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
            f"{checkpoint} lacks {', '.join(lacking)}, so it cannot be resumed; name an older one of this run.\n"
            f"To train further from its weights alone: --model {checkpoint} --output_dir ANOTHER"
        )
