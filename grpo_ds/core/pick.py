"""Rows of a tensor by an index in which no row occurs twice; the gradient is a pick as well.

The backward of plain indexing adds: on a card with atomics, whose order changes from run to run.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOWHERE = -1  # index of a result row that is 0


class Pick:
    """N rows of a tensor of M = `length` rows, by their index; no row occurs twice.

    Example: rows 2 and 0 of three, a row of zeros between them; the inverse puts them back.
        >>> pick = Pick(torch.tensor([2, NOWHERE, 0]), length=3)
        >>> pick(torch.tensor([5.0, 6.0, 7.0])).tolist()
        [7.0, 0.0, 5.0]
        >>> pick.inverse()(torch.tensor([7.0, 0.0, 5.0])).tolist()
        [5.0, 0.0, 7.0]
    """

    def __init__(self, index: Int[Tensor, " N"], *, length: int) -> None:
        self.index = index
        behind = torch.where(index == NOWHERE, length, index)  # the results that come from nowhere go nowhere
        back = torch.full((length + 1,), NOWHERE, device=index.device)
        self.back = back.scatter_(0, behind, torch.arange(len(index), device=index.device))[:-1]

    def __call__(self, rows: Float[Tensor, "M ..."]) -> Float[Tensor, "N ..."]:
        return _Picked.apply(rows, self.index, self.back)

    def inverse(self) -> "Pick":
        """Return the pick that puts each row back, and 0 where no row was picked."""
        return Pick(self.back, length=len(self.index))


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        nowhere = (index == NOWHERE).view(-1, *[1] * (rows.dim() - 1))
        return rows.index_select(0, index.clamp(min=0)).masked_fill_(nowhere, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        return _Picked.apply(grad, back, index), None, None
