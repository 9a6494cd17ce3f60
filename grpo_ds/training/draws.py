"""Random numbers of sampling: a stream for each row, and tokens drawn with it.

B rows, C tokens in the longest completion, V ids of the vocabulary.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], temperature: float) -> Int[Tensor, " B"]:
    """Draw each row's next token from its own uniform number by the inverse of the cumulative distribution.

    Temperature 0 takes the most likely token.
    """
    if not temperature:
        return logits.argmax(dim=-1)
    # fp64: over 150,000 tokens the rounding of an fp32 sum is as large as the probability of a rare token.
    cumulative = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return token.squeeze(1).clamp_(max=logits.shape[1] - 1)


def seed_at(seed: int, step: int, rank: int) -> int:
    """Return a different seed for each step and rank, so that no draw is shared and no state has to be saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=4).digest(), "big")


def uniforms(seed: int, rows: int, columns: int) -> Float[Tensor, "B C"]:
    """Uniform numbers in [0, 1), each row from its own random stream; the same on every device."""
    streams = []
    for row in range(rows):
        digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        streams.append(torch.rand(columns, generator=generator, dtype=torch.float64))
    return torch.stack(streams)
