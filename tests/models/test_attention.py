"""Attention over packed rows: equal to attention over each sequence alone, by kernels that a card has, unsynced."""

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grpo_ds.core.packing import fill_rows, pack
from grpo_ds.models import attention
from grpo_ds.models.attention import ALIGNED, PackedAttention
from tests.core.test_packing import make_groups
from tests.core.test_pick import Operations

HEADS = [(4, 4), (4, 2), (6, 1)]  # of queries, of keys
GROUPS = {  # lengths of prompts and completions, tokens per batch
    "groups of one size": ([5, 3], [[4, 1, 7], [6, 6, 2]], 0),
    "a group split over rows of two and one": ([5], [[4, 1, 7]], 12),
    "one token each": ([5, 3], [[1, 1], [1, 1]], 0),
}
# Operators whose result has a size or a value that the host waits for.
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


def packed(groups):
    prompts, completions, budget = GROUPS[groups]
    prompts, ids, mask = make_groups(prompts, completions)
    rows = fill_rows([len(prompt) for prompt in prompts], mask.sum(1).tolist(), budget=budget)
    return pack([row for batch in rows for row in batch], prompts, ids, mask, pad_id=0)


def drawn(rows, heads, keys, width=8, dtype=torch.float32):
    """Query, key and value as a model's projections leave them: views of [R, L, heads, width]."""
    sizes = [(*rows.input_ids.shape, n, width) for n in (heads, keys, keys)]
    device = rows.input_ids.device
    return [torch.randn(size, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for size in sizes]


def alone(rows, query, key, value, scaling):
    """Oracle: softmax over a completion and its prompt, one sequence at a time; 0 where there is no token."""
    r, heads, length, width = query.shape
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    result = torch.zeros(r, length, heads, width)
    for sources, mask in zip(rows.sources, rows.mask, strict=True):
        row, own = sources[0] // length, sources[mask][1:] % length
        tokens = torch.cat([(rows.segments[row] == 0).nonzero().flatten(), own])
        q, k, v = (part[row][:, tokens] for part in (query, key, value))
        scores = (q @ k.mT * scaling).masked_fill(torch.ones(len(tokens), len(tokens)).triu(1).bool(), -torch.inf)
        result[row, tokens] = (scores.softmax(-1) @ v).transpose(0, 1)
    return result


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(("heads", "keys"), HEADS)
@pytest.mark.parametrize("groups", GROUPS)
def test_it_equals_attention_over_each_sequence_alone(groups, heads, keys, flash, monkeypatch):
    monkeypatch.setattr(attention, "_flash_runs", lambda query: flash)
    torch.manual_seed(0)
    rows = packed(groups)
    parts = drawn(rows, heads, keys)
    ours, theirs = (of(rows, *parts, 0.3) for of in (lambda r, *p: PackedAttention(r, torch.float32)(0, *p), alone))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn(ours.shape) * (rows.segments >= 0)[..., None, None]
    for got, want in zip(*(torch.autograd.grad(of, parts, upstream) for of in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


class Calls(TorchFunctionMode):
    """Arguments of every call of scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            self.seen.append(self.named(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def named(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
        return {"parts": (query, key, value), "mask": attn_mask, "causal": is_causal, "gqa": enable_gqa}


def test_a_card_computes_every_call_by_a_kernel_that_keeps_no_scores():
    """What torch 2.13 asks for (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), or it takes the math kernel.

    Flash: no mask. Memory-efficient: no shared keys, width a multiple of 8; it copies a mask whose rows are unaligned.
    """
    for groups in GROUPS:
        for flash in (True, False):
            for call in calls(packed(groups), flash):
                query, key, value = call["parts"]
                assert {part.dtype for part in call["parts"]} == {torch.bfloat16}
                assert {part.stride(-1) for part in call["parts"]} == {1} and query.shape[-1] % 8 == 0
                if call["gqa"]:
                    assert flash and call["mask"] is None and call["causal"] and query.shape[2] == key.shape[2]
                    continue
                assert query.shape[:2] == key.shape[:2] == value.shape[:2] and not call["causal"]
                assert call["mask"].dtype == query.dtype and call["mask"].stride(-1) == 1
                assert all(stride % ALIGNED == 0 for stride in call["mask"].stride()[:-1])


def calls(rows, flash):
    with pytest.MonkeyPatch.context() as patched, Calls() as calls:
        patched.setattr(attention, "_flash_runs", lambda query: flash)
        PackedAttention(rows, torch.bfloat16)(0, *drawn(rows, 4, 2, dtype=torch.bfloat16), 0.3)
    return calls.seen


@pytest.mark.parametrize("groups", GROUPS)
def test_a_layer_never_waits_for_the_card(groups):
    rows = packed(groups)
    attend, parts = PackedAttention(rows, torch.float32), drawn(rows, 4, 2)
    with Operations() as layer:
        attend(0, *parts, 0.3).sum().backward()
    for name, arguments in layer.seen:
        assert name not in SYNCS
        assert name != "repeat_interleave"  # waits for the sum of its repeats
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in arguments[1])  # nonzero inside


def test_the_layers_of_a_pass_share_one_mask():
    rows = packed("groups of one size")
    attend = PackedAttention(rows, torch.float32)
    with Calls() as layers:
        for layer in range(3):
            attend(layer, *drawn(rows, 4, 2), 0.3)
    masks = [call["mask"] for call in layers.seen if call["mask"] is not None]
    assert len(masks) == 3 and len({id(mask) for mask in masks}) == 1
