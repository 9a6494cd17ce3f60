"""Packed rows give every completion what it would get alone behind its prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.core.packing import PADDING, PROMPT, pack
from grpo_ds.models.logprob_model import LogprobModel


def make_groups(prompt_lengths, completion_lengths, vocab=250, seed=0):
    """Random prompts and completions; completion_lengths lists G lengths a prompt."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, vocab, (n,), generator=g) for n in prompt_lengths]
    flat = torch.tensor(completion_lengths).flatten()
    mask = torch.arange(int(flat.max())) < flat[:, None]
    return prompts, torch.randint(0, vocab, mask.shape, generator=g), mask


def alone(model, prompts, ids, mask, vocab_size, temperature=1.0):
    """The oracle: one forward pass a completion, full logits, log_softmax and gather."""
    group_size, rows = len(ids) // len(prompts), []
    for b, (completion, counts) in enumerate(zip(ids, mask, strict=True)):
        prompt, completion = prompts[b // group_size], completion[counts]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1, :vocab_size]
        chosen = (logits.float() / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, ids.shape[1] - len(completion))))
    return torch.stack(rows)


def test_a_row_is_laid_out_as_the_docstring_says():
    prompts, ids, mask = make_groups([3], [[2, 3]])
    rows = pack(prompts, ids, mask, pad_id=999)
    c1, c2 = ids
    # prompt p0 p1 p2, then c1 without its last token, then c2 without its last token
    assert rows.input_ids.tolist() == [[*prompts[0].tolist(), c1[0], c2[0], c2[1]]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert rows.sources.tolist() == [[2, 3, 0], [2, 4, 5]]


def test_a_completion_sees_the_prompt_and_itself_only():
    prompts, ids, mask = make_groups([2], [[3, 3]])
    visible = pack(prompts, ids, mask, pad_id=0).attention_mask()[0, 0].int().tolist()
    assert visible == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # completion 1
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # completion 2: nothing of completion 1
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_equals_alone_in_value_and_gradient(tiny_model, temperature):
    prompts, ids, mask = make_groups([11, 5, 17], [[4, 1, 7], [6, 6, 2], [1, 1, 1]])
    packed = LogprobModel(tiny_model, vocab_size=259, temperature=temperature, chunk_mib=0.01)
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))

    ours = packed(pack(prompts, ids, mask, pad_id=257))
    ours_grad = torch.autograd.grad((ours * upstream).sum(), list(tiny_model.parameters()))
    theirs = alone(tiny_model, prompts, ids, mask, 259, temperature)
    theirs_grad = torch.autograd.grad((theirs * upstream).sum(), list(tiny_model.parameters()))

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for got, want in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_packing_groups_together_or_one_by_one_is_the_same(tiny_model):
    prompts, ids, mask = make_groups([11, 5, 17], [[4, 1, 7], [6, 6, 2], [1, 1, 1]])
    model = LogprobModel(tiny_model, vocab_size=259, temperature=1.0, chunk_mib=1)
    together = model(pack(prompts, ids, mask, pad_id=257))
    for q in range(3):
        part = slice(3 * q, 3 * q + 3)
        row = model(pack(prompts[q : q + 1], ids[part], mask[part], pad_id=257))
        torch.testing.assert_close(row, together[part], atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=3, max_size=3)), min_size=1))
def test_every_counted_token_is_predicted_by_the_token_before_it(groups):
    prompts, ids, mask = make_groups([p for p, _ in groups], [lengths for _, lengths in groups])
    rows = pack(prompts, ids, mask, pad_id=0)
    inputs, segments = rows.input_ids.flatten(), rows.segments.flatten()
    for b, length in enumerate(mask.sum(1).tolist()):
        prompt, source = prompts[b // 3], rows.sources[b]
        assert inputs[source[:length]].tolist() == [prompt[-1].item(), *ids[b, : length - 1].tolist()]
        assert segments[source[:length]].tolist() == [PROMPT] + [b % 3 + 1] * (length - 1)
    real = sum(p for p, _ in groups) + sum(sum(lengths) - len(lengths) for _, lengths in groups)
    assert (rows.segments != PADDING).sum() == real  # the prompt once, nothing twice
