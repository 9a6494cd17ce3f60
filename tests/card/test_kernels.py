"""Which attention kernel a card takes, and the fault that this once was."""

import pytest
import torch

from grpo_ds.core.packing import pack_groups
from grpo_ds.models.attention import PackedAttention
from tests.card.kernels import choice, efficient_backward, flash_backward
from tests.card.recorder import CARD, as_on_a_card

BF16, FP32 = torch.bfloat16, torch.float32


def tensor(heads, tokens=10, width=64, dtype=BF16, batch=2):
    return torch.empty(batch, heads, tokens, width, dtype=dtype, device=CARD)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "masked", "expected"),
    [
        (12, 2, BF16, False, "flash"),  # it lets heads share keys ...
        (2, 2, BF16, True, "efficient"),  # ... but takes no mask
        (12, 2, BF16, True, "math"),  # the fault: a mask and shared keys
        (12, 2, FP32, False, "math"),  # flash takes 16 bits only
        (2, 2, FP32, False, "efficient"),
    ],
)
def test_a_card_takes_this_kernel(heads, kv_heads, dtype, masked, expected):
    query, key = tensor(heads, dtype=dtype), tensor(kv_heads, dtype=dtype)
    mask = torch.empty(2, 1, 10, 10, dtype=dtype, device=CARD) if masked else None
    assert choice(query, key, mask, causal=not masked) == expected


def peak(work):
    with as_on_a_card() as recorder:
        work()
    allocated = highest = 0
    sizes = {}
    for number, size in recorder.events:
        allocated += size - sizes.get(number, 0)
        sizes[number] = size
        highest = max(highest, allocated)
    return highest


def test_the_math_kernel_keeps_scores_in_fp32_and_the_efficient_one_none():
    """12 heads of 500 queries and keys: the scores alone take 12 x 500 x 500 x 4 bytes, 12 MB."""
    scores = 12 * 500 * 500 * 4

    def attend(kv_heads):
        query, key = (tensor(heads, 500, batch=1).requires_grad_() for heads in (12, kv_heads))
        mask = torch.zeros(1, 1, 500, 504, dtype=BF16, device=CARD)[..., :500]
        torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, enable_gqa=kv_heads < 12).sum()

    assert peak(lambda: attend(2)) > 2 * scores > 2 * peak(lambda: attend(12))


def test_a_backward_pass_sums_a_querys_gradient_in_fp32():
    query, key = tensor(12, 100, 128), tensor(2, 100, 128)
    # 2 x 12 heads; 100 rows in tiles of 64 are 128, of 128 columns in fp32; delta: 100 rows in fp32
    assert efficient_backward(query, query, query, query)[:2] == [24 * 128 * 128 * 4, 24 * 100 * 4]
    # ... in 6 sums: 128 multiprocessors for 24 heads; the keys' gradients before they are summed over 6 heads each
    assert flash_backward(query, query, key, key)[:4] == [
        24 * 128 * 4,
        6 * 24 * 128 * 128 * 4,
        2 * 100 * 12 * 128 * 2,
        2 * 100 * 12 * 128 * 2,
    ]


def test_a_mask_whose_rows_are_not_aligned_is_copied():
    def attend(columns):
        query = tensor(2, 100, batch=1)
        mask = torch.zeros(1, 1, 100, columns, dtype=BF16, device=CARD)[..., :100]
        torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)

    assert peak(lambda: attend(100)) - peak(lambda: attend(104)) == 100 * 100 * 2


def test_packed_attention_takes_no_math_kernel(monkeypatch):
    seen = []
    rows = pack_groups([torch.ones(6).long()], torch.ones(4, 3).long(), torch.ones(4, 3, dtype=torch.bool), pad_id=0)
    attend = PackedAttention(rows, BF16)

    def noted(*parts, **options):
        seen.append(choice(*parts, **options))
        return seen[-1]

    monkeypatch.setattr("tests.card.kernels.choice", noted)
    with as_on_a_card():
        for of in (attend, attend.completions, attend.back):
            for name, value in vars(of).items():
                if isinstance(value, torch.Tensor):
                    setattr(of, name, value.to(CARD))
        length = rows.input_ids.shape[1]
        attend(0, tensor(12, length, batch=1), *[tensor(2, length, batch=1)] * 2, 0.1)
    assert seen == ["flash", "efficient"]
