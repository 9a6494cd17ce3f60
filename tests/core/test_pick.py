"""Rows by an index: the value and gradient of plain indexing, without adding."""

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_ds.core.pick import NOWHERE, Pick
from tests.conftest import check_example


class Operations(TorchDispatchMode):
    """Operators that ran, in order: (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


INDEX = torch.tensor([3, NOWHERE, 0, 4, NOWHERE])  # of 6 rows; 1, 2 and 5 are not picked


def test_the_example_is_right():
    check_example(Pick)


def test_a_pick_is_plain_indexing_in_value_and_gradient():
    rows = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    there = (INDEX != NOWHERE)[:, None, None]
    plain = torch.where(there, rows[INDEX.clamp(min=0)], 0)
    upstream = torch.randn(5, 2, 3, dtype=torch.float64)
    ours = Pick(INDEX, length=6)(rows)
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(of, rows, upstream)[0] for of in (ours, plain)))
    assert gradcheck(Pick(INDEX, length=6), rows) and gradgradcheck(Pick(INDEX, length=6), rows)


def test_the_inverse_puts_every_picked_row_back():
    rows, pick = torch.randn(6, 2), Pick(INDEX, length=6)
    back = torch.zeros(6, 2)
    back[[0, 3, 4]] = rows[[0, 3, 4]]
    assert torch.equal(pick.inverse()(pick(rows)), back)


def test_the_gradient_is_made_without_adding():
    rows = torch.randn(6, 2, requires_grad=True)
    picked = Pick(INDEX, length=6)(rows).sum()
    with Operations() as backward:
        picked.backward()
    names = {name for name, _ in backward.seen}
    assert "index_select" in names and not {name for name in names if "add" in name or "put" in name}
