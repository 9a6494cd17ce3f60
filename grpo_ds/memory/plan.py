"""Predicted memory of a run: bytes by phase and component, in GPU memory and in RAM.

A phase counts its largest moment. The sizes come from the code that allocates them: ours, DeepSpeed 0.19.8's
(runtime/zero/stage_1_and_2.py, "ZeRO" below) and transformers'. The plan is for one rank, after the first step, when
the optimizer's moments exist. N is the number of parameters, w the bytes of a weight: 2 in bf16, 4 in fp32. With LoRA,
masters, gradients and moments exist only for the adapter (peft, and bitsandbytes for a base in 4 or 8 bits).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from grpo_ds.memory.activations import ActivationMemory
from grpo_ds.models.shapes import AHEAD, QUANTIZE_BYTES, SHARD_BYTES, ModelShape
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig

MemoryKind = Literal["gpu", "ram"]
MEMORY_NAMES: dict[MemoryKind, str] = {"gpu": "GPU memory", "ram": "RAM"}  # for people, on screen and in files
Device = Literal["cuda", "cpu"]
Bytes = Counter[str]  # component -> bytes; adding two adds shared components and drops empty ones
Moment = tuple[Bytes, Bytes]  # what is alive at the same time: in GPU memory, in RAM
GIB = 2**30
PHASES = ("load", "initialise", "evaluate", "sample", "reference", "update", "step", "save", "resume")
MAPPED = "mapped file"  # resident while it is read; the system drops its pages if memory is short

# Measured by benchmarks/fit.py: Python, torch, transformers, deepspeed, threads; 0.4 GiB before the first step.
PROCESS = int(0.55 * GIB)
# Not measured, as there was no card: memory that a CUDA build of torch and the driver add in RAM ...
CUDA_IN_RAM = int(1.0 * GIB)
# ... and the context with its kernels in GPU memory, which torch's allocator does not count.
CUDA_CONTEXT = int(0.5 * GIB)
# cuBLAS's workspaces for products in a fixed order (CUBLAS_WORKSPACE_CONFIG=:4096:8), for the threads of two passes.
CUBLAS_WORKSPACES = 2 * 8 * 4096 * 1024

RESIDUAL = {"residual": 2, "residual8": 1}  # bytes
MOMENTS_FP32 = 8  # bytes of a parameter, by DeepSpeed's own optimizers
MOMENTS = {"AdamW8bit": 2 + 8 / 256, "SGD": 0}  # by ours; two codes, and two fp32 scales for 256 values
# Extra bytes per gradient element: its cast to fp32 for fp32 masters, and the copy from which its norm is computed
# (fp64 in DeepSpeed; engine.py needs no copy, except if the optimizer is on the card).
GRADIENT_CAST, NORM_COPY, NORM_COPY_ON_CARD = 4, 0, 8


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """Planned bytes of a phase at its largest moment, in each kind of memory.

    Example: the pages of a mapped file do not have to fit.
        >>> phase = PhasePlan("resume", gpu={"weights": 6 * GIB}, ram={"process": GIB, "mapped file": 2 * GIB})
        >>> phase.bytes_in("ram") // GIB, phase.needed_in("ram") // GIB
        (3, 1)
    """

    name: str
    gpu: dict[str, int]  # component -> bytes; empty if the CPU computes
    ram: dict[str, int]

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())

    def components(self, kind: MemoryKind) -> dict[str, int]:
        return self.gpu if kind == "gpu" else self.ram

    def bytes_in(self, kind: MemoryKind) -> int:
        return sum(self.components(kind).values())

    def needed_in(self, kind: MemoryKind) -> int:
        """Bytes that must fit: all except the pages of a mapped file."""
        return self.bytes_in(kind) - (self.ram.get(MAPPED, 0) if kind == "ram" else 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """Planned memory of a run: its phases, in the order of their first use.

    Example: a run that fits a machine with 6 GiB of GPU memory and 8 GiB of RAM.
        >>> plan = Plan((PhasePlan("load", {}, {"weights": 8 * GIB}), PhasePlan("step", {"weights": 6 * GIB}, {})))
        >>> plan.binding("ram").name, plan.peak("ram") // GIB, plan.peak("gpu") // GIB
        ('load', 8, 6)
    """

    phases: tuple[PhasePlan, ...]
    checkpoint: int = 0  # bytes of one checkpoint on disk

    def binding(self, kind: MemoryKind) -> PhasePlan:
        """Return the phase that needs most of this memory."""
        return max(self.phases, key=lambda phase: phase.needed_in(kind))

    def peak(self, kind: MemoryKind) -> int:
        return self.binding(kind).needed_in(kind)


def relative_plan_error(measured: float, planned: float | None) -> float | None:
    """Relative plan error: (measured - planned) / measured; above 0 the plan was too low. None without both."""
    return (measured - planned) / measured if planned and measured else None


def make_plan(shape: ModelShape, config: TrainConfig, ds: DsConfig, *, device: Device = "cuda") -> Plan:
    """Plan the memory that training this shape takes. device "cpu": no card, so everything is in RAM."""
    run = _RunMemory(shape, config, ds, device)
    return Plan(tuple(_phase(name, getattr(run, name)(), device) for name in PHASES), run.checkpoint_bytes())


def _phase(name: str, moments: list[Moment], device: Device) -> PhasePlan:
    """Take the largest moment of each memory; on the CPU all memory is RAM."""
    alive = moments if device == "cuda" else [(Bytes(), gpu + ram) for gpu, ram in moments]
    gpu, ram = (max(parts, key=Counter.total) for parts in zip(*alive, strict=True))
    return PhasePlan(name, dict(+gpu), dict(+ram))


class _RunMemory:
    """The moments of each phase of one run; one method per phase."""

    def __init__(self, shape: ModelShape, config: TrainConfig, ds: DsConfig, device: Device) -> None:
        self.shape, self.config, self.ds = shape, config, ds
        self.on_gpu = device == "cuda"
        self.w = 2 if ds.half else 4
        self.master = 2 if ds.bf16_masters else 4  # bytes of a master weight, and of the gradient it gets
        self.weights = shape.parameters * self.w
        self.trained, self.largest = shape.parameters, shape.largest  # elements: all, and of the largest gradient
        self.dequantised = 0  # bytes of a quantised layer while it multiplies
        if config.lora_r:
            self.trained = shape.lora_parameters(config.lora_r, config.lora_targets)
            self.largest = config.lora_r * max(max(rows, columns) for _, rows, columns, _ in shape.linears)
            self.weights = shape.base_bytes(config.base_bits, self.w) + self.trained * self.w
            if config.base_bits < 16:
                self.dequantised = shape.widest * self.w
        self.activations = ActivationMemory(shape, config, self.w, self.on_gpu)
        self.zero = ds.engine["zero_optimization"]
        self.pins = self.on_gpu and ds.offload and self.zero["offload_optimizer"]["pin_memory"]
        self.process = Bytes({"process": PROCESS, "CUDA in RAM": CUDA_IN_RAM * self.on_gpu})

    # --- what is always there ---------------------------------------------------------------------------------

    def optimizer(self, *, stepped: bool = True) -> Bytes:
        """Masters, gradients and moments, in GPU memory or RAM: the bytes per parameter in docs/memory.md."""
        parameters, ds, ours = self.trained, self.ds, self.ds.optimizer.ours
        masters = self._block(parameters * self.master)
        parts = Bytes({"master weights": masters})
        if stepped:
            parts["moments"] = int(parameters * MOMENTS.get(ds.optimizer.type, MOMENTS_FP32))
            parts["residual"] = parameters * RESIDUAL.get(ds.rounding, 0) * ds.bf16_masters
        if ds.offload:
            parts["gradients"] = masters
            alias = ds.share_staging or (ds.bf16_masters and ours)  # of the gradients' memory, or of the masters
            parts["staging buffer"] = 0 if alias else self._block(self.trained * self.w)
            # ZeRO: accumulated_grads_in_cpu, which bf16 gradients do not need.
            several = self.activations.backwards > 1 and not ds.bf16_masters
            parts["accumulated gradients"] = self._block(self.trained * self.w) * several
        return parts

    def resident(self, *, stepped: bool = True) -> Moment:
        """Components that are alive between any two phases; stepped: the moments exist."""
        gpu, ram = Bytes({"weights": self.weights}), self.process
        if self.ds.offload:
            ram = ram + self.optimizer(stepped=stepped)
            # ZeRO: temp_grad_buffer_for_gpu_offload; engine.py frees it if a step has one backward.
            gpu["accumulation buffer"] = self.largest * self.w * (stepped and self.activations.backwards > 1)
        else:
            gpu += self.optimizer(stepped=stepped)
        gpu["cuBLAS workspaces"] = CUBLAS_WORKSPACES * self.on_gpu
        gpu["CUDA graphs"] = self.activations.graphs()
        reference = Bytes({"reference": self.reference_bytes() if self.config.beta else 0})
        return (gpu, ram + reference) if self.config.reference_kind == "bf16-cpu" else (gpu + reference, ram)

    def reference_bytes(self) -> int:
        sizes = {"int8": self.shape.int8_bytes(self.w), "llm.int8": self.shape.llm_int8_bytes(self.w)}
        sizes |= dict.fromkeys(("bf16", "bf16-cpu"), self.weights)
        sizes["streamed"] = 0
        sizes["adapter"] = self.trained * self.w  # a copy of the adapter; the policy has the base
        return sizes[self.config.reference_kind]

    def _block(self, size: int) -> int:
        """Round up to a power of two, as torch's pinned allocator does."""
        return 1 << (size - 1).bit_length() if self.pins else size

    def _during(self, gpu: dict[str, int], ram: dict[str, int] | None = None, *, stepped: bool = True) -> Moment:
        """Add these components to what is always there."""
        resident_gpu, resident_ram = self.resident(stepped=stepped)
        return resident_gpu + Bytes(gpu), resident_ram + Bytes(ram or {})

    # --- the phases -------------------------------------------------------------------------------------------

    def load(self) -> list[Moment]:
        """from_pretrained maps a bf16 file: bf16 weights are its pages, not read yet; others are converted."""
        if self.config.base_bits < 16:  # quantised tensor by tensor, on the card if there is one
            gpu = Bytes({"weights": self.weights, "one dequantised layer": self.dequantised})
            return [(gpu, self.process)]
        converted = {"weights": self.weights, MAPPED: self.shape.parameters * 2} if not self.ds.bf16 else {}
        return [(Bytes(), self.process + Bytes(converted))]

    def initialise(self) -> list[Moment]:
        """deepspeed.initialize copies the trained weights into one flat buffer and clones the masters from it.

        On a card with an optimizer in RAM both copies are made in RAM (zero_staging.py: weights_once). The moments are
        made later, by the first step.
        """
        flat, trained = Bytes({"weights": self.weights}), self.trained * self.w
        copy = Bytes({"second copy of the weights": trained})  # unflattened, or cloned for the masters
        moves = self.on_gpu and self.config.base_bits == 16
        moved = self.process + Bytes({"weights in transfer": self.weights * moves})
        every = self.optimizer(stepped=False)
        masters = Bytes({"master weights": self.trained * self.master})
        if not self.ds.offload:  # ZeRO allocates a gradient buffer once and drops it
            return [(flat + copy, moved), (flat + every + Bytes({"gradients": masters.total()}), self.process)]
        buffers = Bytes({"buffers of the largest parameter": self.largest * self.w})  # engine.py frees them later,
        every["staging buffer"] = self._block(trained)  # and this
        every["accumulated gradients"] = 0
        if self.pins:  # masters and staging buffer exist twice while they are pinned: pageable and pinned
            every["pageable originals"] = masters.total() + trained
        begun = (flat + buffers, self.process + every + buffers)
        if not self.on_gpu:  # on a CPU a clone in the masters' dtype is the master
            return [(flat + copy, moved), begun, *[(flat + copy, self.process + masters)] * (self.w != self.master)]
        in_ram = Bytes({"weights in transfer": trained})
        cloned = in_ram if self.w != self.master else Bytes()  # else the clone is the master
        return [
            (flat, moved),
            (Bytes({"weights": self.weights - trained}), self.process + in_ram + copy),
            (flat, self.process + cloned + masters),
            begun,
        ]

    def evaluate(self) -> list[Moment]:
        return [self._during(moment) for moment in self.activations.answering(self.dequantised)]

    def sample(self) -> list[Moment]:
        return [self._during(moment) for moment in self.activations.sampling(self.dequantised)]

    def reference(self) -> list[Moment]:
        """Making the reference, layer by layer, and computing log-probs with it."""
        kind, forward = self.config.reference_kind, self.activations.forward(self.dequantised)
        if not self.config.beta:
            return [self.resident()]
        if kind == "bf16-cpu":  # copied on the card first
            return [self._during({"reference in transfer": self.weights * self.on_gpu}), self._during({}, forward)]
        if kind == "streamed":
            return self._streamed(forward)
        if kind != "int8":
            return [self._during(forward)]
        gpu, ram = self.resident(stepped=self.config.num_iterations > 1)
        gpu["reference"] *= not self.shape.tied  # the largest matrix is quantised first, an untied head last
        making = gpu + Bytes({"quantising the largest matrix": self.largest * QUANTIZE_BYTES[self.w]})
        return [(making, ram), self._during(self.activations.forward(self.shape.widest * self.w))]

    def _streamed(self, forward: dict[str, int]) -> list[Moment]:
        """Comparing the policy with its files, a matrix at a time, and log-probs with layers that pass through."""
        layer, stored = self.shape.in_a_layer, 2  # bytes of a stored weight
        compared = self.largest * self.w * (self.on_gpu or self.w != stored)  # a copy, from the card or converted
        at_once = min(1 + AHEAD, self.shape.layers)
        passing = {"streamed layers": layer * self.w * at_once * self.on_gpu}
        converted = {"streamed layer": layer * self.w * (not self.on_gpu and self.w != stored)}
        return [
            self._during({}, {MAPPED: self.largest * stored, "compared weights": compared}),
            self._during(forward | passing, {MAPPED: (self.largest + layer) * stored} | converted),
        ]

    def update(self) -> list[Moment]:
        """Forward and backward: the head forward and backward, then the layers', and at the end the embedding's."""
        activations, w = self.activations, self.w
        gradients = self.trained * w * (not self.ds.offload or self.ds.zero_stage < 2)  # that stay on the card ...
        earlier = gradients * (activations.backwards > 1)  # ... and are added to those of earlier backwards
        bucket = self.zero["reduce_bucket_size"] * w * (2 if self.zero["overlap_comm"] else 1)
        kept = {"gradient bucket": bucket, "gradients": gradients + earlier}  # from the first layer's backward on
        stored = {"activations kept for backward": activations.checkpoints()} | activations.masks()
        head, leaving, layer = self.largest * w, self._beside_gradient(), activations.layer_backward()
        untied = (head + self.largest * leaving) * (not self.shape.tied)  # of the head, which leaves first
        in_head = {**stored, "gradients": earlier, "log-probs": activations.logprobs(backward=True)}
        in_layers = {**stored, **kept, "a layer's activations": layer}
        return [
            self._during({**stored, "gradients": earlier, "log-probs": activations.logprobs()}),
            self._during({**in_head, "largest gradients": head}),
            self._during({**stored, **kept, "hidden states": activations.behind_layers(), "largest gradients": untied}),
            # A tied head's gradient is kept until it is added to the embedding's gradient.
            self._during({**in_layers, "largest gradients": head * self.shape.tied}),
            self._during({**kept, "largest gradients": head + self.largest * leaving}),
        ]

    def _beside_gradient(self) -> int:
        """Extra bytes per element while a gradient moves to RAM: a clone, the norm's copy and the cast in turn."""
        if not self.ds.offload:
            return self.w
        return max(self.w, GRADIENT_CAST if self.w < self.master else 0, NORM_COPY)

    def step(self) -> list[Moment]:
        """The optimizer's step: in RAM nothing new, on the card a second copy of the gradients, flat and in fp32."""
        if self.ds.offload:
            return [self.resident()]
        gradients = self.trained * self.w
        norm = {"gradients": gradients, "largest gradients": self.largest * NORM_COPY_ON_CARD}
        flat = gradients + self.trained * 4 * (self.w == 2)
        return [self._during(norm), self._during({"gradients": gradients, "flat gradients": flat})]

    def save(self) -> list[Moment]:
        """save_pretrained, a file at a time; a merged adapter needs a second copy of the base in RAM."""
        shard = min(self.trained * self.w, max(SHARD_BYTES, self.largest * self.w)) * self.on_gpu
        merged = self.shape.parameters * self.w * self.config.merge_adapter
        return [self._during({}, {"shard in transfer": shard, "merged model": merged})]

    def resume(self) -> list[Moment]:
        """DeepSpeed's file (masters, moments) is mapped and copied into place; the reference is read after it."""
        gpu, ram = self.resident()
        kept = Bytes({MAPPED: self.saved_states()})
        for memory in (gpu, ram):
            del memory["reference"]
        return [(gpu, ram + kept), self._during({}, {MAPPED: self.reference_bytes() if self.config.beta else 0})]

    def saved_states(self) -> int:
        """Bytes of DeepSpeed's shards."""
        states = self.optimizer()
        return sum(states[name] for name in ("master weights", "moments", "residual"))

    def checkpoint_bytes(self) -> int:
        """Bytes of the shards, of the trained weights as a model folder, and of the reference."""
        return self.saved_states() + self.trained * self.w + (self.reference_bytes() if self.config.beta else 0)
