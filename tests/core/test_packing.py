"""Packed rows give every completion the log-probs that it gets alone behind its prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.core.packing import PADDING, PROMPT, fill_rows, pack, pack_groups
from grpo_ds.models.logprob_model import LogprobModel


def make_groups(prompt_lengths, completion_lengths, vocab=250, seed=0):
    """Random prompts and completions; completion_lengths has a list of G lengths for each prompt."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, vocab, (n,), generator=g) for n in prompt_lengths]
    flat = torch.tensor(completion_lengths).flatten()
    mask = torch.arange(int(flat.max())) < flat[:, None]
    return prompts, torch.randint(0, vocab, mask.shape, generator=g), mask


def filled(prompts, mask, budget=0, only=None):
    return fill_rows([len(prompt) for prompt in prompts], mask.sum(1).tolist(), budget=budget, only=only)


def alone(model, prompts, ids, mask, vocab_size, temperature=1.0):
    """Oracle: one forward pass for each completion, full logits, log_softmax and gather."""
    group_size, rows = len(ids) // len(prompts), []
    for b, (completion, counts) in enumerate(zip(ids, mask, strict=True)):
        prompt, completion = prompts[b // group_size], completion[counts]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1, :vocab_size]
        chosen = (logits.float() / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, ids.shape[1] - len(completion))))
    return torch.stack(rows)


def test_a_row_is_laid_out_as_the_docstring_says():
    prompts, ids, mask = make_groups([3], [[2, 3]])
    rows = pack_groups(prompts, ids, mask, pad_id=999)
    c1, c2 = ids
    # prompt p0 p1 p2, then c1 without its last token, then c2 without its last token
    assert rows.input_ids.tolist() == [[*prompts[0].tolist(), c1[0], c2[0], c2[1]]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert rows.sources.tolist() == [[2, 3, 0], [2, 4, 5]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_equals_alone_in_value_and_gradient(tiny_model, temperature):
    prompts, ids, mask = make_groups([11, 5, 17], [[4, 1, 7], [6, 6, 2], [1, 1, 1]])
    packed = LogprobModel(tiny_model, vocab_size=259, temperature=temperature, chunk_mib=0.01)
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))

    ours = packed(pack_groups(prompts, ids, mask, pad_id=257))
    ours_grad = torch.autograd.grad((ours * upstream).sum(), list(tiny_model.parameters()))
    theirs = alone(tiny_model, prompts, ids, mask, 259, temperature)
    theirs_grad = torch.autograd.grad((theirs * upstream).sum(), list(tiny_model.parameters()))

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for got, want in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


GROUPS = [11, 5, 17], [[4, 1, 7, 3], [6, 6, 2, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize("budget", [1, 18, 24, 30, 45, 1000])
def test_any_packing_gives_the_same_logprobs_and_gradients(tiny_model, budget):
    """Budgets from one completion a row (18 splits every group) to everything in one batch."""
    prompts, ids, mask = make_groups(*GROUPS)
    model = LogprobModel(tiny_model, vocab_size=259, temperature=1.0, chunk_mib=1)
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    weights = list(tiny_model.parameters())
    at_once = model(pack_groups(prompts, ids, mask, pad_id=257))
    want = torch.autograd.grad((at_once * upstream).sum(), weights)

    got, seen = [torch.zeros_like(w) for w in weights], torch.zeros(len(ids), dtype=torch.long)
    for rows in filled(prompts, mask, budget):
        part = torch.tensor([b for row in rows for b in row.completions])
        seen[part] += 1
        logprobs = model(pack(rows, prompts, ids, mask, pad_id=257))
        torch.testing.assert_close(logprobs, at_once[part], atol=1e-5, rtol=1e-5)
        for sum_, grad in zip(got, torch.autograd.grad((logprobs * upstream[part]).sum(), weights), strict=True):
            sum_ += grad
    assert seen.tolist() == [1] * len(ids)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=3, max_size=3)), min_size=1),
    st.integers(1, 60),
    st.sets(st.integers(0, 8)),
)
def test_batches_keep_to_the_budget_and_hold_each_chosen_completion_once(groups, budget, only):
    prompts, lengths = [p for p, _ in groups], [n for _, group in groups for n in group]
    batches = fill_rows(prompts, lengths, budget=budget, only=only)
    for rows in batches:
        single = len(rows) == len(rows[0].completions) == 1
        assert single or max(row.tokens for row in rows) * len(rows) <= budget
        for row in rows:
            assert row.tokens == prompts[row.prompt] + sum(lengths[b] - 1 for b in row.completions)
            assert {b // 3 for b in row.completions} == {row.prompt}
    held = sorted(b for rows in batches for row in rows for b in row.completions)
    assert held == sorted(b for b in only if b < len(lengths))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=3, max_size=3)), min_size=1))
def test_every_counted_token_is_predicted_by_the_token_before_it(groups):
    prompts, ids, mask = make_groups([p for p, _ in groups], [lengths for _, lengths in groups])
    rows = pack_groups(prompts, ids, mask, pad_id=0)
    inputs, segments = rows.input_ids.flatten(), rows.segments.flatten()
    for b, length in enumerate(mask.sum(1).tolist()):
        prompt, source = prompts[b // 3], rows.sources[b]
        assert inputs[source[:length]].tolist() == [prompt[-1].item(), *ids[b, : length - 1].tolist()]
        assert segments[source[:length]].tolist() == [PROMPT] + [b % 3 + 1] * (length - 1)
    real = sum(p for p, _ in groups) + sum(sum(lengths) - len(lengths) for _, lengths in groups)
    assert (rows.segments != PADDING).sum() == real  # each prompt once, each token once


def unpacked(rows):
    """(prompt, completion) of each segment, recovered from ids, segments and targets alone."""
    found, b = [], 0
    for row, (ids, segments) in enumerate(zip(rows.input_ids, rows.segments, strict=True)):
        for k in range(1, _completions_in(rows, row) + 1):
            completion = torch.cat([ids[segments == k], rows.targets[b][rows.mask[b]][-1:]])  # its last: no input
            found.append((ids[segments == PROMPT].tolist(), completion.tolist()))
            b += 1
    return found


def _completions_in(rows, row):
    width = rows.input_ids.shape[1]
    return int((rows.sources[:, 0] // width == row).sum())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=4, max_size=4)), min_size=1, max_size=5),
    st.integers(0, 60),
)
def test_what_is_packed_is_unpacked_again_whatever_the_lengths_and_the_budget(groups, budget):
    prompts, ids, mask = make_groups([p for p, _ in groups], [lengths for _, lengths in groups])
    order, found = [], []
    for batch in filled(prompts, mask, budget):
        rows = pack(batch, prompts, ids, mask, pad_id=0)
        alone_too_long = len(batch) == len(batch[0].completions) == 1
        assert not budget or alone_too_long or rows.input_ids.numel() <= budget
        part = [b for row in batch for b in row.completions]
        order, found = order + part, found + unpacked(rows)
        for b, sources in zip(part, rows.sources, strict=True):
            length = int(mask[b].sum())  # token t is predicted at position len(prompt) - 1 + t
            first = len(prompts[b // 4]) - 1
            assert rows.position_ids.flatten()[sources[:length]].tolist() == list(range(first, first + length))
    assert sorted(order) == list(range(len(ids)))
    assert found == [(prompts[b // 4].tolist(), ids[b][mask[b]].tolist()) for b in order]
