"""Count what decoding one token costs on a card: kernels, waits for the card, bytes; needs no card and no weights.

The real sampler runs on shapes alone (torch's meta device) and every operator is counted as the kernels that eager
CUDA launches for it: a view or an allocation none, a product one (and one for each operand that must be copied first,
or to which a matrix is added out of place), F.rms_norm one, everything else one. What cuBLAS launches inside a
product, such as a reduction after split-K, is not seen. Weights are views of one buffer, as ZeRO keeps them.

Times are computed from public bandwidths, not measured: reading the bytes, and 1 us between two kernels; without a
graph at least 5 us a kernel, for launching it.

    python benchmarks/decode_count.py [--questions 1] [--prompt 450] [--generations 8] [--completion 300]
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo_ds.models.shapes import PRESET_CONFIGS
from grpo_ds.training import sampling

ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
FREE = (*ALLOCATIONS, "_unsafe_view", "lift_fresh", "detach", "_local_scalar_dense", "device")
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # index of the first factor
GATHERS = ("embedding", "index_select", "index", "searchsorted")  # read about as much as they write
BANDWIDTHS = {"RTX 4060 Ti": 288e9, "RTX 3090": 936e9, "RTX 4090": 1008e9}  # bytes/s, as NVIDIA states them
LAUNCH, GAP = 5e-6, 1e-6  # seconds of the host to launch a kernel; of the card between two kernels
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b")


@dataclass(frozen=True, slots=True)
class Cost:
    """Kernels launched, waits of the host for the card, bytes read and written."""

    kernels: float
    syncs: float
    bytes: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.kernels - other.kernels, self.syncs - other.syncs, self.bytes - other.bytes)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.kernels + other.kernels, self.syncs + other.syncs, self.bytes + other.bytes)

    def __mul__(self, n: int) -> "Cost":
        return Cost(self.kernels * n, self.syncs * n, self.bytes * n)

    def __truediv__(self, n: int) -> "Cost":
        return Cost(self.kernels / n, self.syncs / n, self.bytes / n)


@dataclass(frozen=True, slots=True)
class Shape:
    """Prompts, tokens of the longest one, rows of each, tokens of a row."""

    questions: int
    prompt: int
    generations: int
    completion: int

    def __str__(self) -> str:
        return f"{self.questions} x {self.generations} rows, {self.prompt} + {self.completion} tokens"


class Counter(TorchDispatchMode):
    """Count the kernels of every operator; a copy to the CPU is a wait, and gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.syncs, self.bytes, self.paused = 0, 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self.syncs += 1
            with _disable_current_modes():
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
        out = func(*args, **kwargs)
        if not (self.paused or func.is_view or name in FREE):
            self.add(name, args, kwargs, out)
        return out

    def add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs = [x for x in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if is_tensor(x)]
        if inputs and all(x.device.type == "cpu" for x in inputs):
            return
        self.kernels += 1 + (_copies(name, args, kwargs) if name in PRODUCTS else 0)
        outputs = [x for x in tree_leaves(out) if is_tensor(x)]
        if name == "index_copy_":
            inputs, outputs = [args[2], args[3]], [args[3]]
        elif name in GATHERS:
            inputs = outputs
        self.bytes += sum(_bytes(x) for x in inputs) + sum(_bytes(x) for x in outputs)

    @property
    def cost(self) -> Cost:
        return Cost(self.kernels, self.syncs, self.bytes)


class FusedNorms(TorchFunctionMode):
    """Count F.rms_norm as the one kernel that it is on a card, whatever torch makes of it on other devices."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in (F.rms_norm, torch.rms_norm) or self.counter.paused:
            return func(*args, **(kwargs or {}))
        self.counter.paused = True
        out = func(*args, **(kwargs or {}))
        self.counter.paused = False
        self.counter.add("rms_norm", args, kwargs or {}, out)
        return out


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _bytes(x: Tensor) -> int:
    """Bytes of distinct elements: an expanded dimension is read once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return int(torch.Size(sizes).numel()) * x.element_size()


def _copies(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels beside the product itself: copies of operands, and of what is added to it."""
    first, out = PRODUCTS[name], kwargs.get("out")
    copies = sum(not _is_matrix(x) for x in (*args[first : first + 2], *([out] if out is not None else [])))
    if first and not name.endswith("_") and kwargs.get("beta", 1) != 0:
        # cuBLAS adds a bias itself, if more than one row is written without gaps.
        bias = args[0].dim() == 1 and len(args[1]) > 1 and (out is None or out.is_contiguous())
        copies += not (bias or out is args[0])
    return copies


def _is_matrix(x: Tensor) -> bool:
    """Return True if cuBLAS can read x: in its last two dimensions one stride is 1 and the other spans it."""
    (*_, rows, columns), (*_, down, right) = x.shape, x.stride()
    return (right == 1 and down >= columns) or (down == 1 and right >= rows)


class Done(Exception):
    """Enough tokens were counted."""


class Words:
    """As much of a tokenizer as the sampler needs while no row ends."""

    eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [""] * len(ids)


def on_meta(config: dict[str, Any], layers: int, *, flat: bool = True) -> PreTrainedModel:
    """Make a model of shapes alone, its weights in one buffer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**config, "num_hidden_layers": layers}), dtype=torch.bfloat16
        ).eval()
        if flat:
            buffer, end = torch.empty(sum(p.numel() for p in model.parameters()), dtype=torch.bfloat16), 0
            for p in model.parameters():
                p.data = buffer[end : end + p.numel()].view(p.shape)
                end += p.numel()
    return model


@contextmanager
def counted() -> Iterator[Counter]:
    with Counter() as counter, FusedNorms(counter):
        yield counter


def of_a_token(model: PreTrainedModel, shape: Shape, *, ours: bool) -> Cost:
    """Cost of a token half-way through a rollout: as on a card, or with transformers' layers token by token."""
    look = sampling.LOOK
    middle = shape.completion // 2 // look * look
    before: list[Cost] = []  # each token

    def poll() -> None:
        before.append(counter.cost)
        if len(before) > middle + look:
            raise Done

    with patch.object(sampling, "on_card", lambda model: ours), counted() as counter:
        sampler = sampling.Sampler(
            model,
            Words(model.config.vocab_size),  # type: ignore[arg-type]
            max_completion_length=shape.completion,
            cuda_graphs=ours,
            poll=poll,
        )
        sampler.full_length, sampler.shares, sampler.fused = True, True, ours
        rows = shape.questions * shape.generations
        draws = torch.zeros(rows, shape.completion, dtype=torch.float64, device="meta")
        prompts = [[1] * (shape.prompt + 1 - q) for q in range(shape.questions)]  # of different lengths
        with suppress(Done):
            sampler._sample(prompts, shape.generations, draws, 1.0, (), lambda done, tokens: None)
    return (before[middle + look] - before[middle]) / look


def of_layers(config: dict[str, Any], shape: Shape, *, ours: bool, flat: bool = True) -> tuple[Cost, Cost]:
    """Cost of one layer and of all layers and what surrounds them, for a token; from models of one and two layers."""
    one, two = (of_a_token(on_meta(config, layers, flat=flat), shape, ours=ours) for layers in (1, 2))
    layer = two - one
    return layer, one + layer * (config["num_hidden_layers"] - 1)


def milliseconds(cost: Cost, bandwidth: float, *, graph: bool) -> float:
    """Time that the counts allow for a token."""
    running = cost.bytes / bandwidth + cost.kernels * GAP
    return 1e3 * (running if graph else max(running, cost.kernels * LAUNCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"questions": 1, "prompt": 450, "generations": 8, "completion": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    shape = Shape(**vars(parser.parse_args()))
    cards = " | ".join(f"{card}, ms" for card in BANDWIDTHS)
    print(f"| {shape} | kernels a layer | a token | waits a token | MB a token / weights | {cards} |")
    print("|---" * (5 + len(BANDWIDTHS)) + "|")
    for name in MODELS:
        for ours in (False, True):
            print(row(name, shape, ours=ours))


def row(name: str, shape: Shape, *, ours: bool) -> str:
    """Line of the table for a model."""
    config = PRESET_CONFIGS[name]
    layer, token = of_layers(config, shape, ours=ours)
    weights = sum(p.numel() for p in on_meta(config, config["num_hidden_layers"]).parameters()) * 2
    times = []
    for bandwidth in BANDWIDTHS.values():
        eager, graph = (milliseconds(token, bandwidth, graph=graph) for graph in (False, True))
        times.append(f"{eager:.1f} -> {graph:.1f}" if ours else f"{eager:.1f}")
    read = f"{token.bytes / 1e6:.0f} / {weights / 1e6:.0f}"
    side = "ours: eager -> graph" if ours else "transformers' layers, eager"
    cells = (f"{name}, {side}", f"{layer.kernels:.0f}", f"{token.kernels:.0f}", f"{token.syncs:.3g}", read, *times)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
