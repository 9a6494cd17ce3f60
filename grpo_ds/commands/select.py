"""Predict which model fits this card and this RAM, only from the models' shapes: no weights, no torch, no GPU.

    python launch/select_model.py --gpu_gib 16 --ram_gib 32

Takes the flags of `grpo-ds train` (--batch_size, --num_generations, --max_completion_length, ...) and plans for
prompts and completions of full length. --model NAME shows one model phase by phase.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_ds.commands.settle import check_local
from grpo_ds.memory.plan import GIB, MemoryKind, Plan
from grpo_ds.memory.select import Candidate, best, candidates, remedies, usable
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import longer_than_made_for, shape_of
from grpo_ds.report.memory_plan import component_table
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.settings.flags import Flags, failed, flag
from grpo_ds.settings.saved_config import prompt_recipe
from grpo_ds.settings.shipped import DS_JSONS
from grpo_ds.system.hardware import gpu_memory_gib, native_precision, ram_gib
from grpo_ds.terminal import escape_control_chars

WIDTH = 130  # columns if the output is not a terminal
KINDS: tuple[MemoryKind, ...] = ("gpu", "ram")


@dataclass(frozen=True, kw_only=True)
class MachineFlags(Flags):
    """The machine to plan for, and how the plan is printed."""

    heading: ClassVar[str] = "machine"

    gpu_gib: float | None = flag(None, "GPU memory in GiB; default: this machine's; 0: no GPU, all on the CPU")
    ram_gib: float | None = flag(None, "RAM in GiB; default: this machine's")
    json: bool = flag(False, "print JSON instead of tables")

    def problems(self) -> list[str]:
        gpu, ram = self.gpu_gib, self.ram_gib
        return [
            *failed(
                (gpu is not None and gpu < 0, f"gpu_gib is {gpu}; it must be 0 GiB (no GPU) or more"),
                (ram is not None and ram <= 0, f"ram_gib is {ram}; it must be more than 0 GiB"),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class SelectConfig(MachineFlags, TrainConfig):
    """A training run that is only planned."""


def main(argv: list[str]) -> None:
    parsed = parse(SelectConfig, argv, about=__doc__)
    asked = parsed.unchecked()
    gpu = (gpu_memory_gib() or 0.0) if asked.gpu_gib is None else asked.gpu_gib
    ram = ram_gib() if asked.ram_gib is None else asked.ram_gib
    one = asked.model if asked.model != "auto" else "" if gpu else EMBEDDED
    config = parsed.config(PRESETS[one].recipe if one in PRESETS else prompt_recipe(Path(one)))
    if one:
        check_local(config)
    found = all_candidates(one, config, parsed.typed, gpu, ram)
    chosen, typed = best(found), typed_flags(config, parsed.typed)
    shape = (chosen or found[0]).job.shape
    if warning := longer_than_made_for(shape, config.max_prompt_length, config.max_completion_length):
        print(escape_control_chars(warning), file=sys.stderr)
    if config.json:
        return print(json.dumps(as_json(found, chosen, typed, gpu, ram), indent=2))
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False, soft_wrap=True)
    console.print(overview(found, gpu, ram))
    if one:
        shown = chosen or found[0]
        title = f"{shown.job.shape.name}, {shown.ds_file}, reference {shown.reference}"
        for kind in KINDS if gpu else KINDS[1:]:
            console.print(component_table(shown.plan, title, kind))
    console.print(Text(escape_control_chars(advice(found, chosen, typed, gpu, ram))))


def all_candidates(one: str, config: SelectConfig, typed: frozenset[str], gpu: float, ram: float) -> list[Candidate]:
    """Return all presets, or only `one`, with every allowed DeepSpeed JSON and kind of reference."""
    models = [one] if one else [name for name, preset in PRESETS.items() if preset.hub_id]
    ds_files = resolved(config, typed, on_gpu=gpu > 0)
    given = "reference" in typed or config.lora_r > 0
    references = (config.reference,) if given else ("int8", "streamed", "bf16-cpu")
    shapes = [shape_of(model, trust_remote_code=config.trust_remote_code) for model in models]
    return [
        candidate
        for shape in shapes
        for candidate in candidates(shape, config, ds_files, references, gpu_gib=gpu, ram_gib=ram)
    ]


def resolved(config: SelectConfig, typed: frozenset[str], *, on_gpu: bool) -> dict[str, DsConfig]:
    """Return the DeepSpeed JSON of --ds, or for a GPU every shipped one, filled from the flags."""
    native = native_precision(on_gpu=on_gpu)
    sizes = config.ds_sizes(native=native)
    files = {config.ds: Path(config.ds)}
    if on_gpu and "ds" not in typed:
        # The optimizer on the GPU first, which needs no step on the CPU; then fp32 masters before bf16 masters.
        shipped = sorted(DS_JSONS.names(), key=lambda name: ("lowram" in name, "gpu" not in name))
        shipped = [name for name in shipped if native == "bf16" or "lowram" not in name]  # its masters are bf16
        files = {name: DS_JSONS.folder / Path(name).name for name in shipped}
    return {name: resolve_ds_config(path, fill=sizes, explicit=typed) for name, path in files.items()}


def typed_flags(config: SelectConfig, typed: frozenset[str]) -> str:
    """Return the typed flags that the recommended command needs again, as words."""
    own = {"model", "plan", "ds", "reference", "beta", "gpu_gib", "ram_gib", "json"}
    flags = [(name, getattr(config, name)) for name in sorted(typed - own)]
    return "".join(f" --{name} {'null' if value is None else shlex.quote(str(value))}" for name, value in flags)


def overview(found: list[Candidate], gpu: float, ram: float) -> Table:
    """Return a table of all candidates; a ! marks a memory that is too small."""
    title = f"Predicted peaks in GiB, for {gpu:g} GiB of GPU memory and {ram:g} GiB of RAM"
    table = Table(title=title, title_justify="left")
    columns = ("model", "DeepSpeed JSON", "reference", "GPU", "in phase", "RAM", "in phase", "")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in (3, 5) else "left")
    limits = usable(gpu, ram)
    for candidate, after in zip(found, [*found[1:], None], strict=True):
        cells = []
        for kind, limit in zip(KINDS, limits, strict=True):
            peak = candidate.plan.peak(kind)
            cells += [f"{peak / GIB:.1f}{'!' if peak > limit else ''}", candidate.plan.binding(kind).name]
        names = candidate.job.shape.name, Path(candidate.ds_file).name, candidate.reference
        answer = "fits" if candidate.fits else "no"
        last = after is None or after.job.shape != candidate.job.shape
        table.add_row(*(Text(escape_control_chars(cell)) for cell in (*names, *cells, answer)), end_section=last)
    return table


def advice(found: list[Candidate], chosen: Candidate | None, typed: str, gpu: float, ram: float) -> str:
    """Return the command line to run, or changes that make the smallest candidate fit."""
    on_gpu, in_ram = (limit / GIB for limit in usable(gpu, ram))
    of_gpu = f"{on_gpu:.1f} GiB of GPU memory (computed from the code, not yet measured on a GPU) and " if gpu else ""
    usable_line = f"Usable: {of_gpu}{in_ram:.1f} GiB of RAM."
    if chosen:
        return f"{usable_line}\nRun: {chosen.command(typed)}"
    smallest = found[0]
    changes = remedies(smallest.job, gpu, ram)
    if not changes:
        return f"{usable_line}\nNothing fits, even with all changes. Without a GPU: --model {EMBEDDED}"
    lines = [f"  {remedy.change}  (costs: {remedy.cost})" for remedy in changes]
    return "\n".join([usable_line, f"Nothing fits yet. {smallest.command(typed)} would with:", *lines])


def as_json(found: list[Candidate], chosen: Candidate | None, typed: str, gpu: float, ram: float) -> dict[str, object]:
    return {
        "gpu_gib": gpu,
        "ram_gib": ram,
        "run": chosen.command(typed) if chosen else None,
        "candidates": [
            {
                "model": candidate.job.shape.name,
                "parameters": candidate.job.shape.parameters,
                "ds": candidate.ds_file,
                "reference": candidate.reference,
                "fits": candidate.fits,
                "phases": phases_json(candidate.plan),
            }
            for candidate in found
        ],
    }


def phases_json(plan: Plan) -> dict[str, dict[str, dict[str, int]]]:
    """Phase -> gpu or ram -> component -> bytes."""
    return {phase.name: {"gpu": phase.gpu, "ram": phase.ram} for phase in plan.phases}
