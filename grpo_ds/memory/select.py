"""Compare a plan with a machine's memory: if it fits, the cheapest changes that make it fit, and the best model.

The planner's margins are defined here.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_ds.memory.plan import CUDA_CONTEXT, GIB, Device, MemoryKind, Plan, make_plan
from grpo_ds.models.shapes import ModelShape, adapter_base
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_checks import SGD
from grpo_ds.settings.ds_config import SMALL_BUCKET, DsConfig, OptimizerSpec
from grpo_ds.system import invocation

RAM_RESERVE = 2 * GIB  # the system, the launcher's two processes (0.45 GiB, measured) and page cache for the files
# Bytes that torch's allocator needs beside the allocated ones: pages that are partly used, and gaps. The most that
# tests/card simulates with expandable segments; without them it would be up to 15 %.
PAGES, FRAGMENTATION = int(0.1 * GIB), 0.015


def usable(gpu_gib: float, ram_gib: float) -> tuple[int, int]:
    """Return the bytes of GPU memory and of RAM that a plan may fill."""
    gpu = (gpu_gib * GIB - CUDA_CONTEXT - PAGES) / (1 + FRAGMENTATION)
    return max(0, int(gpu)), max(0, int(ram_gib * GIB - RAM_RESERVE))


def reserved(allocated: int) -> int:
    """Return the bytes that torch's allocator takes from a card for so many allocated ones."""
    return int(allocated * (1 + FRAGMENTATION)) + PAGES


def fits(plan: Plan, gpu_gib: float, ram_gib: float) -> bool:
    """Return True if the plan fits with the margins; a plan for the CPU needs no GPU memory."""
    gpu, ram = usable(gpu_gib, ram_gib)
    return plan.peak("gpu") <= gpu and plan.peak("ram") <= ram


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a plan depends on.

    Example:
        Job(shape_of("qwen2.5-3b"), TrainConfig(), ds, "cuda").plan().peak("gpu")  # bytes
    """

    shape: ModelShape
    config: TrainConfig
    ds: DsConfig
    device: Device = "cuda"

    def plan(self) -> Plan:
        return make_plan(self.shape, self.config, self.ds, device=self.device)


def fitted(job: Job, gpu_gib: float, ram_gib: float) -> Job:
    """Fill the flags that the memory plan chooses.

    Reference: streamed from its files if the run fits only then.
    Completions sampled at once: as many as possible while evaluation needs less than the largest other phase.
    Gradient checkpointing: off if the run fits without it and leaves room, for a faster update.
    """
    job = with_room_for_its_reference(job, gpu_gib, ram_gib)
    if job.config.gradient_checkpointing is None:
        without = replace(job, config=replace(job.config, gradient_checkpointing=False))
        plenty = fits(without.plan(), gpu_gib * ROOM, ram_gib * ROOM)
        job = without if plenty else replace(job, config=replace(job.config, gradient_checkpointing=True))
    if job.config.generation_batch_size is None:
        sizes = [replace(job, config=replace(job.config, generation_batch_size=rows)) for rows in BATCH_SIZES]
        kind: MemoryKind = "gpu" if job.device == "cuda" else "ram"
        job = next((it for it in sizes if it.plan().binding(kind).name != "evaluate"), sizes[-1])
    return job


def with_room_for_its_reference(job: Job, gpu_gib: float, ram_gib: float) -> Job:
    """Return the job with a streamed reference if --reference is auto and only that makes it fit, else unchanged."""
    if job.config.reference != "auto" or job.config.lora_r or not job.config.beta:
        return job
    streamed = replace(job, config=replace(job.config, reference="streamed"))
    fit = [fits(it.plan(), gpu_gib, ram_gib) for it in (job, streamed)]
    return streamed if fit == [False, True] else job


ROOM = 0.8  # share of a memory that may be filled only for speed
BATCH_SIZES = (64, 32, 16, 8)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of a flag or of the DeepSpeed JSON, its cost, and the jobs that it changes."""

    change: str
    cost: str
    when: Callable[[Job], bool]
    flags: Mapping[str, Any] = field(default_factory=dict)
    ds: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)  # keys of zero_optimization

    def apply(self, job: Job) -> Job:
        engine = {**job.ds.engine, "zero_optimization": {**job.ds.engine["zero_optimization"], **self.zero}}
        ds = replace(job.ds, engine=engine, **self.ds)
        return replace(job, config=replace(job.config, **self.flags), ds=ds)


def remedies(job: Job, gpu_gib: float, ram_gib: float) -> tuple[Remedy, ...]:
    """Return the fewest, then cheapest changes that make the job fit; () if it fits or nothing helps."""
    if fits(job.plan(), gpu_gib, ram_gib):
        return ()
    for number in range(1, MOST_REMEDIES + 1):
        for some in itertools.combinations(REMEDIES, number):
            changed = applied(job, some)
            if changed and fits(changed.plan(), gpu_gib, ram_gib):
                return some
    return ()


def applied(job: Job, changes: tuple[Remedy, ...]) -> Job | None:
    """Apply all changes. None if one of them changes nothing (fewer changes were tried before) or cannot be used."""
    for remedy in changes:
        if not remedy.when(job):
            return None
        job = remedy.apply(job)
    return None if job.config.problems() else job


def _more_than(flag: str, value: float, cost: str) -> Remedy:
    return Remedy(f"--{flag} {value}", cost, lambda job: (getattr(job.config, flag) or 0) > value, flags={flag: value})


def _another_reference(kind: str, cost: str) -> Remedy:
    def other(job: Job) -> bool:  # with LoRA the reference is the policy's own base, which cannot be smaller
        return job.config.beta > 0 and job.config.reference_kind not in (kind, "adapter")

    return Remedy(f"--reference {kind}", cost, other, flags={"reference": kind})


def _ours(job: Job) -> bool:
    return job.ds.offload and job.ds.optimizer.ours


def _adam(job: Job) -> bool:
    return _ours(job) and job.ds.optimizer.type != SGD


MOST_REMEDIES = 4
IN_RAM = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
EIGHT_BIT = {"optimizer": OptimizerSpec("AdamW8bit", {}), "share_staging": True}
HALVES = {"bf16_masters": True, "rounding": "residual"}

# In order of cost: little, then speed, then a change of the algorithm.
REMEDIES = (
    Remedy('"pin_memory": false', "slower copies to the card", lambda job: job.ds.offload, zero=IN_RAM),
    Remedy('"share_staging": true', "nothing", _ours, ds={"share_staging": True}),
    Remedy(
        '"reduce_bucket_size": 25000000, "overlap_comm": false',
        "nothing on one card",
        lambda job: job.ds.engine["zero_optimization"]["reduce_bucket_size"] > SMALL_BUCKET,
        zero={"reduce_bucket_size": SMALL_BUCKET, "overlap_comm": False},
    ),
    _more_than("logprob_chunk_mib", 16.0, "smaller matrix products"),
    _more_than("generation_batch_size", 8, "slower sampling and evaluation"),
    Remedy(
        "--gradient_checkpointing true",
        "a third more compute",
        lambda job: job.config.gradient_checkpointing is False,
        flags={"gradient_checkpointing": True},
    ),
    Remedy(
        "--ds ds_configs/zero2.json",
        "the step on the CPU",
        lambda job: not job.ds.offload and job.ds.optimizer.type != SGD,
        ds={"offload": True, "zero_stage": 2, "share_staging": True},
        zero=IN_RAM,
    ),
    Remedy('"type": "AdamW8bit"', "moments in 8 bits", lambda job: job.ds.offload and not _ours(job), ds=EIGHT_BIT),
    _another_reference("int8", "a KL floor"),
    _another_reference("streamed", "the reference read from its files at every step"),
    Remedy(
        "--ds ds_configs/zero2_lowram.json",
        "gradients in bf16",
        lambda job: _adam(job) and job.ds.bf16 and not job.ds.bf16_masters,
        ds=HALVES,
    ),
    Remedy(
        "--pack_tokens 2048",
        "gradients over PCIe several times per step",
        lambda job: job.config.longest <= 2048 != job.config.pack_tokens,
        flags={"pack_tokens": 2048},
    ),
    Remedy(
        "--ds ds_configs/zero2_lowram7.json",
        "gradients in bf16, masters without their last 8 bits",
        lambda job: _adam(job) and job.ds.bf16,
        ds={**HALVES, "rounding": "residual8"},
    ),
    Remedy(
        'zero2_sgd.json with "rounding": "residual8"',
        "masters without their last 8 bits",
        lambda job: _ours(job) and job.ds.bf16 and job.ds.optimizer.type == SGD,
        ds={**HALVES, "rounding": "residual8"},
    ),
    Remedy(
        'zero2_lowram.json with "rounding": "stochastic"',
        "masters without their lower bits",
        lambda job: _adam(job) and job.ds.bf16,
        ds={**HALVES, "rounding": "stochastic"},
    ),
    _another_reference("bf16-cpu", "log-probs on the CPU, perhaps minutes per step"),
    _more_than("batch_size", 1, "fewer questions per step"),
    _more_than("max_completion_length", 200, "shorter answers"),
    _more_than("max_prompt_length", 512, "shorter contexts"),
    _more_than("num_generations", 2, "the smallest group"),
    Remedy(
        "--ds ds_configs/zero2_sgd.json",
        "SGD in place of Adam, at a learning rate of its own",
        lambda job: _adam(job) and job.ds.bf16,
        ds={**HALVES, "optimizer": OptimizerSpec(SGD, {})},
    ),
    Remedy(
        "--lora_r 16",
        "only an adapter is trained",
        lambda job: not job.config.lora_r and not adapter_base(job.config.model),
        flags={"lora_r": 16},
    ),
    Remedy(
        "--load_in_4bit true",
        "a frozen base in 4 bits",
        lambda job: job.config.lora_r > 0 and job.config.base_bits > 4,
        flags={"load_in_4bit": True, "load_in_8bit": False},
    ),
    Remedy("--beta 0", "no KL to a reference", lambda job: job.config.beta > 0, flags={"beta": 0.0}),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model with a DeepSpeed JSON and a kind of reference."""

    ds_file: str
    job: Job
    plan: Plan
    fits: bool

    @property
    def reference(self) -> str:
        return self.job.config.reference_kind if self.job.config.beta else "none"

    def command(self, typed: str = "") -> str:
        """Return the command line that trains it. typed: further flags."""
        flags = {"none": " --beta 0", "int8": "", "adapter": ""}.get(self.reference, f" --reference {self.reference}")
        train = invocation.command("train", launcher="deepspeed")
        return f"{train} --model {self.job.shape.name} --ds {self.ds_file}{flags}{typed}"


def candidates(
    shape: ModelShape,
    config: TrainConfig,
    ds_files: Mapping[str, DsConfig],
    references: Sequence[str],
    *,
    gpu_gib: float,
    ram_gib: float,
) -> Iterator[Candidate]:
    """Combine a model with every JSON, every reference and none; without a card the plan is for the CPU."""
    changes: list[dict[str, Any]] = [{"reference": kind} for kind in references if config.beta] + [{"beta": 0.0}]
    for change in changes:
        for ds_file, ds in ds_files.items():
            job = Job(shape, replace(config, **change), ds, "cuda" if gpu_gib else "cpu")
            plan = job.plan()
            yield Candidate(ds_file, job, plan, fits(plan, gpu_gib, ram_gib))


def best(found: Iterable[Candidate]) -> Candidate | None:
    """Return the first candidate of the largest model that fits."""
    fitting = [candidate for candidate in found if candidate.fits]
    return max(fitting, key=lambda candidate: candidate.job.shape.parameters, default=None)
