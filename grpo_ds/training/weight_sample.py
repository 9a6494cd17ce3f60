"""A sample of the trained weights, which shows what share of them training has changed.

A step of Adam moves a weight by about the learning rate, and bf16 holds no change of a weight below 1/512 of it. With
fp32 masters small steps add up until the next bf16 number is reached; without them they are lost. So the share is
measured on the weights that the model computes with.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

SAMPLED = 1024  # weights, at least; a share of 5 % has an error of 0.7 points


def sampled_weights(model: nn.Module) -> Float[Tensor, " N"]:
    """Trained weights at equal distances over all parameters, in fp32 on the CPU; all of them if there are few."""
    trained = [parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad]
    every = max(1, sum(map(len, trained)) // SAMPLED) | 1  # odd: an even distance could always meet the same column
    picked, passed = [], 0
    for weights in trained:
        picked.append(weights[-passed % every :: every])
        passed += len(weights)
    return torch.cat(picked).float().cpu()


def as_hex(weights: Float[Tensor, " N"]) -> str:
    """Write a sample exactly, for trainer_state.json."""
    return weights.numpy().tobytes().hex()


def share_moved(start: str, now: Float[Tensor, " N"]) -> float:
    """Share of the sample that differs from `start`, the result of `as_hex`."""
    first = torch.frombuffer(bytearray.fromhex(start), dtype=torch.float32)
    return float((first != now).double().mean())
