"""Share of the trained weights that training has changed: of a sample at each step, of all when they are saved.

A step of Adam moves a weight by about the learning rate, and bf16 holds no change of a weight below 1/512 of it. With
fp32 masters small steps add up until the next bf16 number is reached; without them they are lost. So the share is
measured on the weights that the model computes with.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo_ds.models.base_weights import model_folder
from grpo_ds.models.stored_weights import StoredWeights

SAMPLED = 1024  # weights, at least; a share of 5 % has an error of 0.7 points
AT_ONCE = 1 << 24  # weights that are compared at once, on the CPU


def sampled_weights(model: nn.Module) -> Float[Tensor, " N"]:
    """Trained weights at equal distances over all parameters, in fp32 on the CPU; all of them if there are few."""
    return _sample([parameter.detach() for parameter in model.parameters() if parameter.requires_grad])


def _sample(weights: Sequence[Tensor]) -> Float[Tensor, " N"]:
    every = max(1, sum(map(torch.numel, weights)) // SAMPLED) | 1  # odd: an even distance could meet the same column
    picked, passed = [], 0
    for tensor in weights:
        picked.append(tensor.flatten()[-passed % every :: every])
        passed += tensor.numel()
    return torch.cat(picked).float().cpu()


def as_hex(weights: Float[Tensor, " N"]) -> str:
    """Write a sample exactly, for trainer_state.json."""
    return weights.numpy().tobytes().hex()


def share_moved(start: str, now: Float[Tensor, " N"]) -> float:
    """Share of the sample that differs from `start`, the result of `as_hex`."""
    first = torch.frombuffer(bytearray.fromhex(start), dtype=torch.float32)
    return float((first != now).double().mean())


def share_changed(model: nn.Module, name: str, start: str) -> float | None:
    """Share of all trained weights that differ from those in the files of the model `name`, with which the run began.

    start: `as_hex` of a sample at the beginning; None is returned if the files are not here or hold other weights.
    """
    trained = {name: it.detach() for name, it in model.named_parameters() if it.requires_grad}
    if (folder := model_folder(name)) is None:
        return None
    try:
        first = StoredWeights(folder).read(trained)
    except (OSError, SafetensorError, KeyError):  # other files, or an adapter's weights
        return None
    if any(first[name].shape != weights.shape for name, weights in trained.items()):
        return None
    if as_hex(_sample([first[name].to(weights.dtype) for name, weights in trained.items()])) != start:
        return None
    changed = sum(_count(first[name], weights) for name, weights in trained.items())
    return changed / sum(map(torch.numel, trained.values()))


def _count(first: Tensor, weights: Tensor) -> int:
    """Return how many weights are another number in their own dtype."""
    pieces = zip(first.flatten().split(AT_ONCE), weights.flatten().split(AT_ONCE), strict=True)
    return sum(int((old.to(new.dtype) != new.cpu()).sum()) for old, new in pieces)
