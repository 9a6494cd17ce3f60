"""Predict which model fits this card and this RAM, and how long its steps take, only from the models' shapes.

    python launch/select_model.py --gpu_gib 16 --ram_gib 32

Needs no weights, no torch and no GPU. First the answer: the largest model with all parameters, with LoRA and with
QLoRA, and its command; then a table of what was compared. Takes the flags of `grpo-ds train` (--batch_size,
--num_generations, --max_completion_length, ...) and plans for prompts and completions of full length. --model NAME
shows one model phase by phase.
"""

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_ds.commands.settle import check_local
from grpo_ds.memory.plan import GIB, MemoryKind, Plan
from grpo_ds.memory.select import Candidate, best, candidates, fitted, remedies, usable
from grpo_ds.memory.speed import CARDS, Card, card_named, step_seconds, typical_card
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import longer_than_made_for, shape_of
from grpo_ds.report.memory_plan import component_table
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig, resolve_ds_config
from grpo_ds.settings.flags import Flags, failed, flag
from grpo_ds.settings.saved_config import prompt_recipe
from grpo_ds.settings.shipped import DS_JSONS
from grpo_ds.system.hardware import Precision, gpu_memory_gib, gpu_name, native_precision, ram_gib
from grpo_ds.terminal import escape_control_chars

WIDTH = 130  # columns if the output is not a terminal
KINDS: tuple[MemoryKind, ...] = ("gpu", "ram")
OF_AN_ADAPTER = {"lora_r", "load_in_4bit", "load_in_8bit"}
WAYS: dict[str, dict[str, Any]] = {
    "All parameters": {},
    "LoRA": {"lora_r": 16},
    "QLoRA": {"lora_r": 16, "load_in_4bit": True},
}
BY_SGD = "All parameters, by SGD", {"ds": "ds_configs/zero2_sgd.json"}  # said if it makes a larger model fit
REFERENCES = {
    "int8": "on the card, in 8 bits",
    "llm.int8": "the same by bitsandbytes",
    "streamed": "from its files",
    "bf16": "on the card",
    "bf16-cpu": "in RAM",
    "adapter": "the policy's own base",
    "none": "--beta 0",
}
MEASURED = (
    "Measured on two CPU cores with bf16: `make train`, 22 steps and both evaluations, takes five to six minutes."
)


@dataclass(frozen=True, kw_only=True)
class MachineFlags(Flags):
    """The machine to plan for, and how the plan is printed."""

    heading: ClassVar[str] = "machine"

    gpu: str | None = flag(None, "name of the card, such as 'RTX 3060'; default: this machine's, or one of that size")
    json: bool = flag(False, "print JSON instead of tables")

    @property
    def card(self) -> Card | None:
        """The named card, or this machine's if it is known."""
        return card_named(self.gpu or gpu_name() or "")

    def problems(self) -> list[str]:
        known = ", ".join(card.name for card in CARDS)
        unknown = self.gpu is not None and card_named(self.gpu) is None
        return [
            *failed((unknown, f"gpu is {self.gpu!r}; known are {known}; of others give --gpu_gib alone")),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class SelectConfig(MachineFlags, TrainConfig):
    """A training run that is only planned."""


def main(argv: list[str]) -> None:
    parsed = parse(SelectConfig, argv, about=__doc__)
    asked = parsed.unchecked()
    named = card_named(asked.gpu or "")
    gpu = asked.gpu_gib if asked.gpu_gib is not None else named.gib if named else gpu_memory_gib() or 0.0
    ram = ram_gib() if asked.ram_gib is None else asked.ram_gib
    one = asked.model if asked.model != "auto" else "" if gpu else EMBEDDED
    config = parsed.config(PRESETS[one].recipe if one in PRESETS else prompt_recipe(Path(one)))
    if one:
        check_local(config)
    found = all_candidates(one, config, parsed.typed, gpu, ram)
    chosen, typed = best(found), typed_flags(config, parsed.typed)
    # Without --gpu the card is this machine's only if its memory is planned for.
    card = (config.card if named or asked.gpu_gib is None else None) or typical_card(gpu)
    answers = all_answers(one, config, parsed.typed, gpu, ram, card)
    shape = (chosen or found[0]).job.shape
    if warning := longer_than_made_for(shape, config.max_prompt_length, config.max_completion_length):
        print(escape_control_chars(warning), file=sys.stderr)
    if config.json:
        return print(json.dumps(as_json(found, chosen, typed, gpu, ram, answers), indent=2))
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False, soft_wrap=True)
    for line in opening(answers, gpu, ram, card):
        console.print(Text(escape_control_chars(line)))
    console.print(overview(found, gpu, ram))
    console.print(Text(signs(found)))
    if one:
        shown = chosen or found[0]
        title = f"{shown.job.shape.name}, {shown.ds_file}, reference {shown.reference}"
        for kind in KINDS if gpu else KINDS[1:]:
            console.print(component_table(shown.plan, title, kind))
    console.print(Text(escape_control_chars(advice(found, chosen, typed, gpu, ram))))


@dataclass(frozen=True, slots=True)
class Answer:
    """The largest model that can be trained in one way, as the run would train it.

    Example:
        Answer("LoRA", None, "")  # none fits
    """

    way: str
    chosen: Candidate | None
    command: str
    seconds: float | None = None  # of a step; None: not known

    @property
    def size(self) -> int:
        """Parameters of the model; 0 if none fits."""
        return self.chosen.job.shape.parameters if self.chosen else 0

    @property
    def hours(self) -> float | None:
        steps = self.chosen.job.config.total_steps if self.chosen else 0
        return self.seconds * steps / 3600 if self.seconds is not None else None

    def text(self) -> str:
        """The answer in a sentence, and its command."""
        if self.chosen is None:
            return f"{self.way}: nothing fits."
        job, plan = self.chosen.job, self.chosen.plan
        card = f"{plan.peak('gpu') / GIB:.1f} GiB of GPU memory and " if job.device == "cuda" else ""
        speed = ""
        if self.seconds is not None:
            speed = (
                f"; {self.seconds:.0f} s a step, {self.hours:.1f} hours for {job.config.total_steps} steps (computed)"
            )
        memory = f"{card}{plan.peak('ram') / GIB:.1f} GiB of RAM"
        return f"{self.way}: {job.shape.name}, with {memory}{speed}\n    {self.command}"


def all_answers(
    one: str, config: SelectConfig, typed: frozenset[str], gpu: float, ram: float, card: Card
) -> list[Answer]:
    """Return the largest model for each way of training, or only for the way that is typed."""
    ways = WAYS if gpu and not typed & OF_AN_ADAPTER else {way_of(config): {}}
    answers = [
        answer(way, one, replace(config, **flags), typed.union(flags), gpu, ram, card) for way, flags in ways.items()
    ]
    if ways == WAYS and not typed & {"ds", "learning_rate"} and precision_of(config, on_gpu=True) == "bf16":
        way, flags = BY_SGD
        by_sgd = answer(way, one, replace(config, **flags), typed.union(flags), gpu, ram, card)
        answers[1:1] = [by_sgd] if by_sgd.size > answers[0].size else []
    return answers


def answer(
    way: str, one: str, config: SelectConfig, typed: frozenset[str], gpu: float, ram: float, card: Card
) -> Answer:
    chosen = best(all_candidates(one, config, typed, gpu, ram))
    if chosen is None:
        return Answer(way, None, "")
    # What the run itself chooses: completions sampled at once, and gradient checkpointing.
    job = fitted(chosen.job, gpu, ram)
    chosen = replace(chosen, job=job, plan=job.plan())
    seconds = step_seconds(job, card) if gpu else None
    return Answer(way, chosen, chosen.command(typed_flags(config, typed)), seconds.total if seconds else None)


def way_of(config: SelectConfig) -> str:
    return "All parameters" if not config.lora_r else "LoRA" if config.base_bits == 16 else "QLoRA"


def opening(answers: list[Answer], gpu: float, ram: float, card: Card) -> list[str]:
    """Return the lines of the answers, and what their seconds are computed from."""
    if not gpu:
        return [*(it.text() for it in answers), MEASURED]
    peaks = f"{card.gb_per_s:g} GB/s, {card.tflops:g} TFLOPS, PCIe {card.pcie:g} GB/s"
    return [
        f"The largest models for {gpu:g} GiB of GPU memory and {ram:g} GiB of RAM:",
        *(it.text() for it in answers),
        f"Seconds are computed, not measured, from the figures of the {card.name} ({peaks}; another: --gpu NAME),\n"
        "for texts of full length: docs/performance.md. Evaluation before and after comes on top.",
    ]


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
    native = precision_of(config, on_gpu=on_gpu)
    sizes = config.ds_sizes(native=native)
    files = {config.ds: Path(config.ds)}
    if on_gpu and "ds" not in typed:
        # The optimizer on the GPU first, which needs no step on the CPU; not for an adapter, whose step takes no
        # time. fp32 masters before bf16 masters, which need a card with bf16, and of these the longer residual first.
        # SGD is another algorithm: BY_SGD asks.
        shipped = sorted(DS_JSONS.names(), key=lambda name: ("lowram" in name, ("gpu" in name) == bool(config.lora_r)))
        shipped = [name for name in shipped if "sgd" not in name and (native == "bf16" or "lowram" not in name)]
        files = {name: DS_JSONS.folder / Path(name).name for name in shipped}
    return {name: resolve_ds_config(path, fill=sizes, explicit=typed) for name, path in files.items()}


def precision_of(config: SelectConfig, *, on_gpu: bool) -> Precision:
    """Return what the named card computes in, or this machine's."""
    card = card_named(config.gpu or "")
    return native_precision(on_gpu=on_gpu) if card is None or card.bf16 else "fp16"


def typed_flags(config: SelectConfig, typed: frozenset[str]) -> str:
    """Return the typed flags that the recommended command needs again, as words."""
    own = {"model", "plan", "ds", "reference", "beta", "gpu", "gpu_gib", "ram_gib", "json"}
    written = {None: "null", True: "true", False: "false"}
    values = {name: getattr(config, name) for name in sorted(typed - own)}
    texts = {name: written[it] if it is None or it is True or it is False else str(it) for name, it in values.items()}
    return "".join(f" --{name} {shlex.quote(text)}" for name, text in texts.items())


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


def signs(found: list[Candidate]) -> str:
    """Explain the columns and the words of the table."""
    references = [kind for kind in REFERENCES if kind in {candidate.reference for candidate in found}]
    return (
        "GPU, RAM: GiB at the peak, and the phase of a step that needs it; !: more than there is.\n"
        "reference, the frozen copy that KL compares with: "
        f"{'; '.join(f'{kind} {REFERENCES[kind]}' for kind in references)}.\n"
        "All with gradient checkpointing, which a run leaves out if it has room; docs/memory.md has the rest."
    )


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


def as_json(
    found: list[Candidate], chosen: Candidate | None, typed: str, gpu: float, ram: float, answers: list[Answer]
) -> dict[str, object]:
    return {
        "gpu_gib": gpu,
        "ram_gib": ram,
        "run": chosen.command(typed) if chosen else None,
        "answers": [
            {
                "way": answer.way,
                "model": answer.chosen.job.shape.name if answer.chosen else None,
                "run": answer.command or None,
                "seconds_per_step": answer.seconds,
                "hours": answer.hours,
            }
            for answer in answers
        ],
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
