"""The runs that are compared: README's table of cards, every recipe, and the choices of `--model auto`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_ds.memory.choose import choose_model
from grpo_ds.memory.select import Job, fitted
from grpo_ds.models.presets import PRESETS, recipe_for
from grpo_ds.models.shapes import PRESET_CONFIGS, gated_shape, shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
CARDS, RAMS = (12, 16, 24), (16, 32, 64)  # GB
CELL = re.compile(r"`(--model [^`]+)`")
SAME = "the same"
MEMORY_FLAGS = (  # what a plan of GPU memory depends on
    *("batch_size", "num_generations", "max_prompt_length", "max_completion_length", "pack_tokens", "temperature"),
    *("logprob_chunk_mib", "gradient_checkpointing", "generation_batch_size", "beta", "reference_kind"),
    *("lora_r", "lora_target", "base_bits"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A run on a machine.

    Example:
        Row("README", "--model qwen2.5-1.5b", card=16, ram=32)
    """

    of: str
    flags: str
    card: int
    ram: int

    def job(self) -> Job:
        return job_of(self.flags, self.card, self.ram)


def job_of(flags: str, card: float, ram: float) -> Job:
    """Return the job that train.py would run with these flags on such a machine."""
    parsed = parse(TrainConfig, flags.split(), about="")
    asked = parsed.unchecked()
    config = parsed.config(recipe_for(PRESETS[asked.model].recipe, asked))
    ds = resolve_ds_config(ROOT / config.ds, fill=config.ds_sizes(native="bf16"))
    return fitted(Job(shape_of(config.model), config, ds), card, ram)


def of_two_layers(job: Job) -> Job:
    """Return the job with a model of two layers and otherwise the same sizes."""
    return replace(job, shape=gated_shape(job.shape.name, {**PRESET_CONFIGS[job.shape.name], "num_hidden_layers": 2}))


def sizes(job: Job) -> tuple[Any, ...]:
    """Return everything that the GPU memory of a job depends on: equal jobs are simulated once."""
    zero = job.ds.engine["zero_optimization"]
    buckets = zero["reduce_bucket_size"], zero["overlap_comm"]
    ds = job.ds.offload, job.ds.bf16_masters, job.ds.zero_stage, *buckets
    return job.shape.name, job.shape.layers, *(getattr(job.config, name) for name in MEMORY_FLAGS), *ds


def rows() -> list[Row]:
    return [*readme_rows(), *recipe_rows(), *page_rows(), *auto_rows()]


def readme_rows(text: str | None = None) -> Iterator[Row]:
    """Read README's table. "the same" is the cell to the left, or at the row's start the cell above."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") if text is None else text
    above: list[list[str]] = [[] for _ in CARDS]
    for ram, line in re.findall(r"^\| (\d+) GB RAM \|(.+)\|$", text, re.M):
        for place, cell in enumerate(line.split("|")):
            if not cell.strip().startswith(SAME):
                above[place] = CELL.findall(cell)
            elif place:
                above[place] = above[place - 1]
            yield from (Row("README", flags, CARDS[place], int(ram)) for flags in above[place])


def recipe_rows() -> Iterator[Row]:
    """Read the card and the RAM that a file of configs/ names; the laptop's names no card."""
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if card := re.search(r"(\d+)gb", file.stem):
            ram = re.search(r"(\d+) GB of RAM", text)
            assert ram, f"{file} says for which RAM it is"
            yield Row("configs", f"--config configs/{file.name}", int(card[1]), int(ram[1]))


def page_rows() -> Iterator[Row]:
    """Read the first table of docs/recipes.md."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for card, ram, flags in re.findall(r"^\| (\d+), (\d+) \| [^|]+ \| `([^`]+)`", text, re.M):
        yield Row("docs/recipes.md", flags, int(card), int(ram))


def auto_rows() -> Iterator[Row]:
    for card in CARDS:
        for ram in RAMS:
            name = choose_model("auto", gpu_gib=card, ram_gib=ram).model
            if name in PRESETS and PRESETS[name].hub_id:
                yield Row("--model auto", f"--model {name}", card, ram)
