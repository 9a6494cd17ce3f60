"""Predicted memory of a run: phases x components, in bytes, on the card and on the host.

A phase is as large as its fullest moment. The sizes are read from the code that allocates them: ours, DeepSpeed
0.19.8's (runtime/zero/stage_1_and_2.py, "ZeRO" below) and transformers'. One rank; the state after the first step,
when the moments exist. N is the number of parameters, w the bytes of a weight: 2 in bf16, 4 in fp32. With LoRA
masters, gradients and moments are those of the adapter alone (peft, and bitsandbytes for a base in 4 or 8 bits).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from grpo_ds.memory.batch import Batch
from grpo_ds.models.shapes import ModelShape
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import DsConfig

Where = Literal["gpu", "host"]
Device = Literal["cuda", "cpu"]
Bytes = Counter[str]  # component -> bytes; adding two adds what they share and drops what is empty
Moment = tuple[Bytes, Bytes]  # what is alive at once, on the card and on the host
GIB = 2**30
PHASES = ("load", "initialise", "evaluate", "sample", "reference", "update", "step", "save", "resume")
MAPPED = "mapped file"  # resident while it is read, and dropped by the system wherever memory is short

# Measured by benchmarks/plan_check.py: Python, torch, transformers, deepspeed, threads; 0.4 GiB before the first step.
PROCESS = int(0.55 * GIB)
# Not measured, there was no card: what a CUDA build of torch and the driver add on the host ...
CUDA_ON_HOST = int(1.0 * GIB)
# ... and context, kernels and cuBLAS workspaces on the card, which torch's allocator does not count.
CUDA_CONTEXT = int(0.5 * GIB)

MOMENTS_8BIT = 2 + 8 / 256  # two codes, and two fp32 scales for 256 values
MOMENTS_FP32 = 8
# Per element of a gradient, beside it: its cast to fp32 on the way to fp32 masters, and the copy its norm is taken
# of (fp64 in DeepSpeed; engine.py takes it without one, but not where the optimizer lives on the card).
GRADIENT_CAST, NORM_COPY, NORM_COPY_ON_CARD = 4, 0, 8
QUANTIZE = {2: 9, 4: 5}  # models/quantized.py, per weight of size w: its fp32 copy, the quotient, the code
SHARD = 2 * 10**9  # models/policy.py: a shard of at most so many bytes is copied from the card to the host


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """The fullest moment of a phase, for each of the two memories."""

    name: str
    gpu: dict[str, int]  # component -> bytes; empty where the CPU computes
    host: dict[str, int]

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def bytes_on(self, where: Where) -> int:
        return self.gpu_bytes if where == "gpu" else self.host_bytes

    def needed_on(self, where: Where) -> int:
        """What has to fit: all but a file's pages."""
        return self.bytes_on(where) - (self.host.get(MAPPED, 0) if where == "host" else 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's phases in the order in which they first come."""

    phases: tuple[PhasePlan, ...]
    checkpoint: int = 0  # bytes of one on the disk

    def binding(self, where: Where) -> PhasePlan:
        """The phase that decides whether the run fits there."""
        return max(self.phases, key=lambda phase: phase.needed_on(where))

    def peak(self, where: Where) -> int:
        return self.binding(where).needed_on(where)


def make_plan(shape: ModelShape, config: TrainConfig, ds: DsConfig, *, device: Device = "cuda") -> Plan:
    """What training this shape takes. `device` "cpu": no card, so all of it is in RAM."""
    run = _Run(shape, config, ds, device)
    return Plan(tuple(_phase(name, getattr(run, name)(), device) for name in PHASES), run.checkpoint_bytes())


def _phase(name: str, moments: list[Moment], device: Device) -> PhasePlan:
    """The fullest moment of each memory; on the CPU the two are one."""
    alive = moments if device == "cuda" else [(Bytes(), gpu + host) for gpu, host in moments]
    gpu, host = (max(parts, key=Counter.total) for parts in zip(*alive, strict=True))
    return PhasePlan(name, dict(+gpu), dict(+host))


class _Run:
    """The moments of each phase of one run; a method a phase."""

    def __init__(self, shape: ModelShape, config: TrainConfig, ds: DsConfig, device: Device) -> None:
        self.shape, self.config, self.ds = shape, config, ds
        self.on_gpu = device == "cuda"
        self.w = 2 if ds.bf16 else 4
        self.master = 2 if ds.bf16_masters else 4  # bytes of a master weight, and of the gradient it gets
        self.weights = shape.parameters * self.w
        self.trained, self.largest = shape.parameters, shape.largest  # elements: all, and of the largest gradient
        self.widened: dict[str, int] = {}  # a quantised layer while it multiplies
        if config.lora_r:
            self.trained = shape.lora_parameters(config.lora_r, config.lora_targets)
            self.largest = config.lora_r * max(max(rows, columns) for _, rows, columns, _ in shape.linears)
            self.weights = shape.base_bytes(config.base_bits, self.w) + self.trained * self.w
            if config.base_bits < 16:
                self.widened = {"a layer in full width": shape.widest * self.w}
        self.batch = Batch(shape, config, self.w, self.on_gpu)
        self.zero = ds.engine["zero_optimization"]
        self.pins = self.on_gpu and ds.offload and self.zero["offload_optimizer"]["pin_memory"]
        self.process = Bytes({"process": PROCESS, "CUDA on the host": CUDA_ON_HOST * self.on_gpu})

    # --- what stays -------------------------------------------------------------------------------------------

    def optimizer(self, *, stepped: bool = True) -> Bytes:
        """Masters and what belongs to them, wherever they live: the ladder of bytes a parameter."""
        parameters, ds, ours = self.trained, self.ds, self.ds.optimizer.type == "AdamW8bit"
        masters = self._block(parameters * self.master)
        parts = Bytes({"master weights": masters})
        if stepped:
            parts["moments"] = int(parameters * (MOMENTS_8BIT if ours else MOMENTS_FP32))
            parts["residual"] = parameters * 2 * (ds.bf16_masters and ds.rounding == "residual")
        if ds.offload:
            parts["gradients"] = masters
            alias = ds.share_staging or (ds.bf16_masters and ours)  # of the spent gradients, or of the masters
            parts["staging copy"] = 0 if alias else self._block(self.trained * self.w)
            # ZeRO: accumulated_grads_in_cpu, which bf16 gradients do without.
            several = self.batch.backwards > 1 and not ds.bf16_masters
            parts["accumulated gradients"] = self._block(self.trained * self.w) * several
        return parts

    def resident(self, *, stepped: bool = True) -> Moment:
        """Between any two phases; stepped: the moments exist."""
        gpu, host = Bytes({"weights": self.weights}), self.process
        if self.ds.offload:
            host = host + self.optimizer(stepped=stepped)
            # ZeRO: temp_grad_buffer_for_gpu_offload; engine.py drops it where a step has one backward.
            gpu["accumulation buffer"] = self.largest * self.w * (self.batch.backwards > 1)
        else:
            gpu += self.optimizer(stepped=stepped)
        reference = Bytes({"reference": self.reference_bytes() if self.config.beta else 0})
        return (gpu, host + reference) if self.config.reference_kind == "bf16-cpu" else (gpu + reference, host)

    def reference_bytes(self) -> int:
        sizes = {"int8": self.shape.int8_bytes(self.w), "llm.int8": self.shape.llm_int8_bytes(self.w)}
        sizes["adapter"] = self.trained * self.w  # as it was; the base is the policy's
        return sizes.get(self.config.reference_kind, self.weights)

    def _block(self, size: int) -> int:
        """torch's pinned allocator takes powers of two."""
        return 1 << (size - 1).bit_length() if self.pins else size

    def _during(self, gpu: dict[str, int], host: dict[str, int] | None = None, *, stepped: bool = True) -> Moment:
        """What stays and what comes on top."""
        resident_gpu, resident_host = self.resident(stepped=stepped)
        return resident_gpu + Bytes(gpu), resident_host + Bytes(host or {})

    # --- the phases -------------------------------------------------------------------------------------------

    def load(self) -> list[Moment]:
        """from_pretrained maps a bf16 file: bf16 weights are its pages, not read yet; fp32 ones are converted here."""
        if self.config.base_bits < 16:  # quantised tensor by tensor, on the card where there is one
            return [(Bytes({"weights": self.weights, **self.widened}), self.process)]
        converted = {"weights": self.weights, MAPPED: self.shape.parameters * 2} if self.w == 4 else {}
        return [(Bytes(), self.process + Bytes(converted))]

    def initialise(self) -> list[Moment]:
        """deepspeed.initialize: what is trained becomes one flat buffer, of which the masters are cloned; moments come
        later."""
        flat, trained = Bytes({"weights": self.weights}), self.trained * self.w
        twice = flat + Bytes({"second copy of the weights": trained})  # unflattened, or cloned for the masters
        moves = self.on_gpu and self.config.base_bits == 16
        moved = self.process + Bytes({"weights on their way": self.weights * moves})
        every = self.optimizer(stepped=False)
        masters = Bytes({"master weights": self.trained * self.master})
        if not self.ds.offload:  # ZeRO tries a gradient buffer on and drops it
            return [(twice, moved), (flat + every + Bytes({"gradients": masters.total()}), self.process)]
        buffers = Bytes({"buffers of the largest parameter": self.largest * self.w})  # engine.py gives them back,
        every["staging copy"] = self._block(trained)  # and this
        every["accumulated gradients"] = 0
        if self.pins:  # the block being pinned still has its pageable original, and so has the staging copy
            every["pageable originals"] = masters.total() + trained
        moments = [(twice, moved), (flat + buffers, self.process + every + buffers)]
        if self.on_gpu or self.w != self.master:  # else the clone is the master
            moments.append((twice, self.process + masters))
        return moments

    def evaluate(self) -> list[Moment]:
        return [self._during(self.batch.answering())]

    def sample(self) -> list[Moment]:
        return [self._during({**self.batch.sampling(), **self.widened})]

    def reference(self) -> list[Moment]:
        """Making the reference, layer by layer, and scoring with it."""
        kind, scoring = self.config.reference_kind, self.batch.scoring()
        if not self.config.beta:
            return [self.resident()]
        if kind == "bf16-cpu":  # copied on the card first
            return [self._during({"reference on its way": self.weights * self.on_gpu}), self._during({}, scoring)]
        if kind != "int8":
            return [self._during({**scoring, **self.widened})]
        gpu, host = self.resident(stepped=self.config.num_iterations > 1)
        gpu["reference"] *= not self.shape.tied  # the largest matrix comes first, an untied head last
        making = gpu + Bytes({"quantising the largest matrix": self.largest * QUANTIZE[self.w]})
        return [(making, host), self._during({**scoring, "a layer in full width": self.shape.widest * self.w})]

    def update(self) -> list[Moment]:
        """Forward and backward: the head's backward, then the layers', and at the end the embedding's."""
        batch, w = self.batch, self.w
        kept = {"gradient bucket": self.zero["reduce_bucket_size"] * w * (2 if self.zero["overlap_comm"] else 1)}
        if not self.ds.offload or self.ds.zero_stage < 2:  # gradients stay; several backwards add into a second set
            kept["gradients"] = self.trained * w * (2 if batch.backwards > 1 else 1)
        stored = kept | {"activations kept for backward": batch.checkpoints()} | batch.masks()
        head, leaving = self.largest * w, self._beside_gradient()
        if self.config.lora_r:  # a layer's output, beside it the adapter's and the same scaled; small gradients
            layer = batch.layer_backward() + 2 * batch.tokens * self.shape.mlp * w + sum(self.widened.values())
        else:
            layer = batch.layer_backward() + self.shape.widest * (w + leaving)
        return [
            self._during({**stored, "largest gradients": head, "log-probs": batch.logprobs()}),
            # A tied head's gradient waits for the embedding's, to which it is added.
            self._during({**stored, "largest gradients": head * self.shape.tied, "a layer's activations": layer}),
            self._during({**kept, "largest gradients": head + self.largest * leaving}),
        ]

    def _beside_gradient(self) -> int:
        """Bytes an element while a gradient leaves for the host: a clone, its norm's copy and its cast in turn."""
        if not self.ds.offload:
            return self.w
        return max(self.w, GRADIENT_CAST if self.w < self.master else 0, NORM_COPY)

    def step(self) -> list[Moment]:
        """The optimizer's step: on the host nothing new, on the card the gradients once more, flat and in fp32."""
        if self.ds.offload:
            return [self.resident()]
        gradients = self.trained * self.w
        norm = {"gradients": gradients, "largest gradients": self.largest * NORM_COPY_ON_CARD}
        flat = gradients + self.trained * 4 * (self.w == 2)
        return [self._during(norm), self._during({"gradients": gradients, "flat gradients": flat})]

    def save(self) -> list[Moment]:
        """save_pretrained; an adapter that is merged goes into a second copy of the base, in the host's memory."""
        shard = min(self.trained * self.w, SHARD) * self.on_gpu
        merged = self.shape.parameters * self.w * self.config.merge_adapter
        return [self._during({}, {"shard on its way": shard, "merged model": merged})]

    def resume(self) -> list[Moment]:
        """DeepSpeed's file (masters, moments) is mapped and copied into place; the reference comes after it."""
        gpu, host = self.resident()
        kept = Bytes({MAPPED: self.saved_states()})
        for memory in (gpu, host):
            del memory["reference"]
        return [(gpu, host + kept), self._during({}, {MAPPED: self.reference_bytes() if self.config.beta else 0})]

    def saved_states(self) -> int:
        """DeepSpeed's shards."""
        states = self.optimizer()
        return sum(states[name] for name in ("master weights", "moments", "residual"))

    def checkpoint_bytes(self) -> int:
        """The shards, the trained weights as a model folder, and the reference."""
        return self.saved_states() + self.trained * self.w + (self.reference_bytes() if self.config.beta else 0)
