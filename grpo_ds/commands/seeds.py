"""`train --num_seeds N`: a recipe with N seeds, one after another, into OUTPUT/seed-S.

Each is an ordinary run in a process of its own: it begins with free memory, and is resumed or asked like any other.
recipe.yaml keeps the flags, so that a command that resumes needs the folder alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.errors import CheckpointError, GrpoError, UsageError
from grpo_ds.report.run_files import read_json
from grpo_ds.report.seeds import write_seeds
from grpo_ds.run_folder.checkpoints import found_in
from grpo_ds.run_folder.files import RECIPE_FILE, SUMMARY_FILE
from grpo_ds.run_folder.lock import check_writable, lock, lock_new
from grpo_ds.run_folder.status import STATUS_FILE
from grpo_ds.settings.command_line import Parsed
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.config_file import read_settings
from grpo_ds.settings.flags import all_flags
from grpo_ds.system.files import write_whole
from grpo_ds.system.invocation import again, command
from grpo_ds.system.signals import pass_signals_on

OF_THE_COMMAND = ("output_dir", "num_seeds", "resume_from_checkpoint")  # not of the recipe


class SeedFailed(GrpoError):
    """A run that did not end well; it has said why."""

    opening = ""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def folder_of_seeds(config: TrainConfig) -> Path | None:
    """Return the folder that the flags name, for a new run or one to resume."""
    resumed = config.resume_from_checkpoint
    named = resumed if resumed and resumed != "auto" else config.output_dir
    return Path(named) if named else None


def train_seeds(parsed: Parsed[TrainConfig], folder: Path) -> None:
    """Run every seed that is not done, then print and write median and range of their held-out figures.

    Raises SeedFailed with the exit code of the first run that fails.
    """
    _refuse_ranks()
    config = parsed.unchecked()
    check_writable(folder)
    if config.resume_from_checkpoint:
        recipe = _known_recipe(parsed, folder)
        lock(folder)
    else:
        recipe = {name: value for name, value in parsed.given.items() if name not in OF_THE_COMMAND}
        lock_new(folder)
        write_whole(folder / RECIPE_FILE, yaml.safe_dump({"seed": config.seed, **recipe}, sort_keys=False))
    count, first = config.num_seeds, recipe.get("seed", config.seed)
    seeds = range(first, first + count)
    for number, seed in enumerate(seeds, start=1):
        run = folder / f"seed-{seed}"
        if not _is_done(run):
            print(f"Seed {seed} ({number} of {count}): {run}", flush=True)
            _train(run, seed, folder, count)
    summaries = {seed: read_json(folder / f"seed-{seed}", SUMMARY_FILE) for seed in seeds}
    print("\n".join([*write_seeds(folder, summaries), f"Written: {folder / SUMMARY_FILE}"]), flush=True)


def _train(run: Path, seed: int, folder: Path, count: int) -> None:
    """Run one seed to its end, from its newest checkpoint if it has one."""
    resume = "auto" if run.is_dir() and found_in(run) else "null"
    words = ["--config", folder / RECIPE_FILE, "--seed", seed, "--output_dir", run, "--num_seeds", 1]
    code = pass_signals_on(again([*map(str, words), "--resume_from_checkpoint", resume]))
    if code:
        flags = f"--num_seeds {count} --output_dir {folder} --resume_from_checkpoint auto"
        raise SeedFailed(
            f"The run with seed {seed} ended with exit code {code}. When it can go on, this continues all of them:\n"
            f"{command('train')} {flags}",
            code,
        )


def _is_done(run: Path) -> bool:
    return (run / SUMMARY_FILE).is_file() and read_json(run, STATUS_FILE).get("state") == "done"


def _known_recipe(parsed: Parsed[TrainConfig], folder: Path) -> Mapping[str, Any]:
    """Return the flags that these runs were started with. Raises an error for others that would change numbers."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {RECIPE_FILE}, so it holds no runs of --num_seeds to resume.")
    recipe, problems = read_settings(file, all_flags(TrainConfig), strict=True)
    if problems:
        raise CheckpointError(f"{file} cannot be used: {problems[0]}")
    typed = {name: value for name, value in parsed.given.items() if name not in OF_THE_COMMAND}
    if other := [f"--{name}" for name, value in typed.items() if recipe.get(name) != value]:
        raise UsageError(
            f"{', '.join(other)}: these runs have the flags of {file}, and all seeds one recipe.\n"
            "Leave them out, or start in another --output_dir."
        )
    return recipe


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "--num_seeds starts one run after another, each on one rank.\n"
            "On several ranks start each seed by itself: --seed 0, --seed 1, ..."
        )
