"""Which model fits this card and this RAM, predicted from the models' shapes alone: no weights, no torch, no GPU.

    python launch/select_model.py --gpu_gib 16 --ram_gib 32

Takes the workload flags of train.py (--batch_size, --num_generations, --max_completion_length, ...); prompts and
completions are taken at their full length. --model NAME shows one model phase by phase.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_ds.errors import UsageError
from grpo_ds.memory.plan import GIB, Plan, Where
from grpo_ds.memory.select import Candidate, best, candidates, remedies, usable
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import shape_of
from grpo_ds.report.plan import components
from grpo_ds.settings.command_line import Parsed, parse
from grpo_ds.settings.config import TrainConfig, knob
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.settings.ds_json import SHIPPED
from grpo_ds.system.hardware import cpu_has_bf16, gpu_memory_gib, ram_gib
from grpo_ds.terminal import escape_control_chars

WIDTH = 130  # columns where the output is no terminal
MEMORIES: tuple[Where, ...] = ("gpu", "host")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(TrainConfig):
    """A training run that is only planned."""

    gpu_gib: float | None = knob(None, "memory of the card; default: this machine's, 0: none, all on the CPU")
    ram_gib: float | None = knob(None, "memory of the machine; default: this machine's")
    json: bool = knob(False, "print JSON instead of tables")


def main(argv: list[str]) -> None:
    asked = parse(SelectConfig, argv, about=__doc__)
    gpu = (gpu_memory_gib() or 0.0) if asked.config.gpu_gib is None else asked.config.gpu_gib
    ram = ram_gib() if asked.config.ram_gib is None else asked.config.ram_gib
    if gpu < 0 or ram <= 0:
        raise UsageError(f"--gpu_gib {gpu:g} and --ram_gib {ram:g}: a memory has more than 0 GiB (a missing card 0).")
    one = asked.config.model if asked.config.model != "auto" else "" if gpu else EMBEDDED
    if one in PRESETS:
        asked = parse(SelectConfig, argv, about=__doc__, recipe=PRESETS[one].recipe)
    models = [one] if one else [name for name, preset in PRESETS.items() if preset.hub_id]
    ds_files = resolved(asked, on_gpu=gpu > 0)
    given = "reference" in asked.typed or asked.config.lora_r > 0
    references = (asked.config.reference,) if given else ("int8", "bf16-cpu")
    found = [
        candidate
        for model in models
        for candidate in candidates(
            shape_of(model, trust_remote_code=asked.config.trust_remote_code),
            asked.config,
            ds_files,
            references,
            gpu_gib=gpu,
            ram_gib=ram,
        )
    ]
    chosen = best(found)
    if asked.config.json:
        return print(json.dumps(as_json(found, chosen, typed_flags(asked), gpu, ram), indent=2))
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False, soft_wrap=True)
    console.print(overview(found, gpu, ram))
    if one:
        shown = chosen or found[0]
        for where in MEMORIES if gpu else MEMORIES[1:]:
            console.print(
                components(shown.plan, f"{shown.job.shape.name}, {shown.ds_file}, reference {shown.reference}", where)
            )
    console.print(Text(escape_control_chars(advice(found, chosen, typed_flags(asked), gpu, ram))))


def resolved(asked: Parsed[SelectConfig], *, on_gpu: bool) -> dict[str, DsConfig]:
    """The DeepSpeed JSON that was typed, or for a card every one that is shipped, filled from the flags."""
    config = asked.config
    sizes = config.ds_sizes(bf16=on_gpu or cpu_has_bf16())
    files = {config.ds: Path(config.ds)}
    if on_gpu and "ds" not in asked.typed:
        # First the optimizer on the card, where it fits: no step on the CPU. Then fp32 masters before split ones.
        shipped = sorted(SHIPPED.glob("*.json"), key=lambda file: ("lowram" in file.name, "gpu" not in file.name))
        files = {f"{SHIPPED.name}/{file.name}": file for file in shipped}
    return {name: resolve_ds_config(path, fill=sizes, explicit=asked.typed) for name, path in files.items()}


def typed_flags(asked: Parsed[SelectConfig]) -> str:
    """The workload flags that were typed, for the command line to run."""
    own = {"model", "plan", "ds", "reference", "beta", "gpu_gib", "ram_gib", "json"}
    flags = [(name, getattr(asked.config, name)) for name in sorted(asked.typed - own)]
    return "".join(f" --{name} {'null' if value is None else shlex.quote(str(value))}" for name, value in flags)


def overview(found: list[Candidate], gpu: float, ram: float) -> Table:
    """Every candidate in a line; what does not fit is marked in the column that is too small."""
    table = Table(
        title=f"Predicted peaks in GiB, for a card of {gpu:g} GiB and {ram:g} GiB of RAM", title_justify="left"
    )
    columns = ("model", "DeepSpeed JSON", "reference", "GPU", "in phase", "RAM", "in phase", "")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in (3, 5) else "left")
    limits = usable(gpu, ram)
    for candidate, after in zip(found, [*found[1:], None], strict=True):
        cells = []
        for where, limit in zip(MEMORIES, limits, strict=True):
            peak = candidate.plan.peak(where)
            cells += [f"{peak / GIB:.1f}{'!' if peak > limit else ''}", candidate.plan.binding(where).name]
        names = candidate.job.shape.name, Path(candidate.ds_file).name, candidate.reference
        answer = "fits" if candidate.fits else "no"
        last = after is None or after.job.shape != candidate.job.shape
        table.add_row(*(Text(escape_control_chars(cell)) for cell in (*names, *cells, answer)), end_section=last)
    return table


def advice(found: list[Candidate], chosen: Candidate | None, typed: str, gpu: float, ram: float) -> str:
    """The command line to run, or what would make the smallest candidate fit."""
    card, host = (limit / GIB for limit in usable(gpu, ram))
    on_card = (
        f"{card:.1f} GiB of the card (its figures are read from code, not yet measured on one) and " if gpu else ""
    )
    usable_line = f"Usable: {on_card}{host:.1f} GiB of RAM."
    if chosen:
        return f"{usable_line}\nRun: {chosen.command(typed)}"
    smallest = found[0]
    changes = remedies(smallest.job, gpu, ram)
    if not changes:
        return f"{usable_line}\nNothing here fits, whatever is changed. Without a card: --model {EMBEDDED}"
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
    """Phase -> gpu or host -> component -> bytes."""
    return {phase.name: {"gpu": phase.gpu, "host": phase.host} for phase in plan.phases}
