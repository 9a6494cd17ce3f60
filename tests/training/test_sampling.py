"""Sampling: ends of completions, their masks, and tokens that are never drawn."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_ds.models.fused_layers import _gate_and_up
from grpo_ds.models.shared_prompt import SharedPrompts
from grpo_ds.training.draws import draw, seed_at, uniforms
from grpo_ds.training.sampling import (
    STOP,
    Completions,
    PartialCompletion,
    Sampler,
    unfinished,
)
from tests.training.layouts import make_engine


@pytest.fixture
def sampler(tiny_model, tokenizer):
    return Sampler(tiny_model, tokenizer, max_completion_length=12)


def greedy_alone(model, prompt, steps, known):
    """The oracle: a full forward pass over the text for every token."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[0, -1, :known]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_prefilled_and_left_padded_sampling_equals_one_prompt_at_a_time(sampler, tiny_model, tokenizer):
    prompts = [[5, 6, 7], list(range(40)), [9, 1]]
    completions = sampler(prompts, group_size=2, temperature=0.0)
    for b, (ids, mask) in enumerate(zip(completions.ids, completions.mask, strict=True)):
        expected = greedy_alone(tiny_model, prompts[b // 2], int(mask.sum()), len(tokenizer))
        assert ids[mask].tolist() == expected


def test_the_same_seed_draws_the_same_and_siblings_differ(sampler):
    one, two, other = (sampler([[1, 2, 3]], group_size=4, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert len({tuple(row.tolist()) for row in one.ids}) == 4


def test_what_is_drawn_does_not_depend_on_how_many_rows_are_drawn_at_once(sampler):
    prompts = [[1, 2, 3], list(range(30)), [7, 5], [8, 9]]
    whole = sampler(prompts, group_size=3, temperature=1.0, seed=5)
    for at_once in (1, 3):
        sampler.rows_at_once = at_once * 3
        parts = sampler(prompts, group_size=3, temperature=1.0, seed=5)
        assert torch.equal(parts.mask, whole.mask) and torch.equal(parts.ended, whole.ended)
        assert torch.equal(parts.ids[parts.mask], whole.ids[whole.mask])


def test_at_full_length_no_row_ends(sampler):
    sampler.full_length = True
    completions = sampler([[1, 2, 3], [4, 5]], group_size=4, temperature=2.0)
    assert completions.mask.all() and completions.ids.shape == (8, sampler.max_completion_length)


def test_the_policy_itself_is_sampled(sampler, tiny_model, tokenizer):
    """First tokens follow softmax(logits / temperature): no top-k, no penalty, no padding ids."""
    prompt, draws = [10, 20, 30], 4000
    sampler.max_completion_length = 1
    first = sampler([prompt], group_size=draws, temperature=0.5).ids[:, 0]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([prompt])).logits[0, -1, : len(tokenizer)]
    expected = (logits / 0.5).softmax(-1)
    counts = torch.bincount(first, minlength=len(tokenizer))
    assert len(counts) == len(tokenizer)
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 258 + 5 * (2 * 258) ** 0.5  # mean and five deviations of chi-square with 258 freedoms


def ends(sampler, ids):
    """Number of tokens after which a row ends; 0 if it does not."""
    return next((t for t in range(1, len(ids) + 1) if sampler._ends(ids[:t])), 0)


def test_the_first_eos_is_trained_and_nothing_after_it(sampler, tiny_model, tokenizer):
    eos = tokenizer.eos_token_id
    assert [ends(sampler, row) for row in ([1, 2, eos, 0], [eos, 3], [1, 2, 3])] == [3, 1, 0]
    rows = [PartialCompletion([1, 2, eos], True), PartialCompletion([eos], True), PartialCompletion([1, 2, 3, 4, 5])]
    completions = sampler.pad_rows(rows)
    assert completions.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert completions.ended.tolist() == [True, True, False]  # the third is cut at the length limit


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("<answer>yes</answer>", True),
        ("<answer>yes</answer", False),
        ("<reasoning>a</reasoning>", False),  # another closing tag
        ("x > y </answer>", True),
        ("</answer>z", False),  # the row ended one token earlier
    ],
)
def test_a_row_ends_at_the_closing_answer_tag(sampler, tokenizer, text, stops):
    assert sampler._ends(tokenizer.encode(text)) == stops


def test_the_prompts_own_tags_do_not_end_a_row(sampler, tokenizer):
    prompt = tokenizer.encode(f"<answer>no{STOP}")
    free, behind_tags = (sampler([ids], group_size=4, temperature=1.0) for ids in ([5, 6, 7], prompt))
    assert behind_tags.lengths().max() == free.lengths().max() == sampler.max_completion_length


@pytest.fixture
def as_on_a_card(sampler, monkeypatch):
    """Run on the CPU what a card runs: fused layers, fixed sizes, a look at ended rows after every few tokens."""
    monkeypatch.setattr("grpo_ds.training.sampling.on_card", lambda model: True)
    monkeypatch.setattr("grpo_ds.training.sampling.packed_linears", nullcontext)  # for CPUs alone
    monkeypatch.setattr("grpo_ds.models.shared_prompt.WIDTH", 5)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_card_samples_what_a_cpu_samples(sampler, cuda_graphs, request):
    """Unused columns are hidden, and what is decoded behind a row's end is cut off."""
    sampler.eos_ids = list(range(0, 259, 12))
    sampler.max_completion_length = 21  # not a multiple of the tokens between two looks
    prompts = [[1, 2, 3], list(range(30)), [7, 5]]
    here = sampler(prompts, group_size=4, temperature=1.0, seed=2)
    request.getfixturevalue("as_on_a_card")
    sampler.cuda_graphs, sampler.shares = cuda_graphs, None
    there = sampler(prompts, group_size=4, temperature=1.0, seed=2)
    assert sampler.fused and len(set(here.lengths().tolist())) > 4
    assert torch.equal(here.ids, there.ids) and torch.equal(here.mask, there.mask)
    assert torch.equal(here.ended, there.ended)


def test_in_zeros_buffer_gate_and_up_are_one_product(tiny_folder, tmp_path):
    mlps = [layer.mlp for layer in make_engine(tiny_folder, tmp_path, "offload, bf16").model.base_model.layers]
    assert all(torch.equal(_gate_and_up(mlp)[-1], mlp.up_proj.weight[-1]) for mlp in mlps)


def test_on_a_card_ended_rows_are_seen_after_at_most_seven_tokens(sampler, as_on_a_card):
    polls = []
    sampler.poll = lambda: polls.append(1)
    sampler.eos_ids = list(range(0, 259, 4))
    sampler.max_completion_length = 64
    longest = int(sampler([[1, 2, 3], [4, 5]], group_size=4, temperature=1.0).lengths().max())
    assert longest < 64 and longest <= len(polls) < longest + 8  # polled before every token


@pytest.mark.parametrize("where", ["cpu", "card"])
@pytest.mark.parametrize("at_once", [None, 3])
def test_every_token_and_every_completion_is_reported_once(sampler, request, where, at_once):
    if where == "card":
        request.getfixturevalue("as_on_a_card")
    sampler.eos_ids, sampler.rows_at_once = list(range(0, 259, 20)), at_once
    reports = []
    completions = sampler(
        [[1, 2, 3], [4, 5], [6, 7]], group_size=3, temperature=1.0, advance=lambda *r: reports.append(r)
    )
    assert completions.ended.any() and not completions.ended.all()  # both kinds are counted
    assert sum(done for done, _ in reports) == 9
    drawn = [tokens for _, tokens in reports if tokens]
    if at_once is None:
        assert drawn == completions.mask.sum(dim=0).tolist()
    assert sum(drawn) == int(completions.mask.sum())


@pytest.mark.parametrize(
    ("ended", "group_size", "stay", "width"),
    [
        ("....", 2, [0, 1, 2, 3], 2),
        ("..x.", 2, [0, 1, 3, 2], 2),  # row 2 keeps its group as large as the other
        (".xx.", 2, [0, 3], 1),
        ("xx..", 2, [2, 3], 2),  # a finished group leaves
        ("x.xxx.xx", 4, [1, 5], 1),
        ("xxx.", 1, [3], 1),
    ],
)
def test_finished_rows_leave_the_batch_and_groups_stay_equally_large(ended, group_size, stay, width):
    assert unfinished([mark == "x" for mark in ended], group_size) == (stay, width)


def test_rows_that_leave_change_no_other_row(sampler, monkeypatch):
    """Compare with a batch that never shrinks; a third of the vocabulary ends a row, so rows leave at every step."""
    sampler.eos_ids = list(range(0, 259, 12))
    prompts = [[1, 2, 3], list(range(30)), [7, 5], [8, 9, 4, 3]]
    shrinking = sampler(prompts, group_size=4, temperature=1.0, seed=2)
    monkeypatch.setattr("grpo_ds.training.sampling.SHRINK", 0.0)
    whole = sampler(prompts, group_size=4, temperature=1.0, seed=2)
    assert len(set(whole.lengths().tolist())) > 4
    assert torch.equal(shrinking.ids, whole.ids) and torch.equal(shrinking.mask, whole.mask)


SIZE = dict(  # large weights, so that one key too few or too many shows
    vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=257, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
GPT2 = dict(vocab_size=272, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=None, eos_token_id=256)
KINDS = {"llama": SIZE, "qwen2": SIZE, "qwen3": {**SIZE, "head_dim": 32}, "mistral": SIZE, "gpt2": GPT2}
NEO = dict(
    vocab_size=272, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
    window_size=8, initializer_range=0.3, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
OTHERS = {  # attention of their own, or a window that is too small: the prompt is repeated
    "gpt_neo": NEO,
    "bloom": dict(vocab_size=272, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=256),
    "mistral-window": {**SIZE, "sliding_window": 16},
}


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_models_of_every_kind_decode_what_they_compute_in_one_pass(kind, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**KINDS, **OTHERS}[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    sampler = Sampler(model, tokenizer, max_completion_length=8)
    prompts = [[5, 6, 7], list(range(20)), [9, 1]]
    completions = sampler(prompts, group_size=3, temperature=1.0, seed=1)
    assert sampler.shares is (kind in KINDS or kind == "mistral-window")
    for b, (ids, mask) in enumerate(zip(completions.ids, completions.mask, strict=True)):
        again = torch.tensor([[*prompts[b // 3], *ids[mask].tolist()]])
        logits = model(again).logits[0, -int(mask.sum()) - 1 : -1, : len(tokenizer)]
        numbers = uniforms(1, 9, 8)[b, : len(logits)]
        assert draw(logits, numbers, 1.0).tolist() == ids[mask].tolist()


def test_a_row_ends_at_a_closing_tag_of_ones_own(tiny_model, tokenizer):
    mine = "</my-final-answer>"  # longer than the default's twelve tokens
    sampler = Sampler(tiny_model, tokenizer, max_completion_length=12, stop=mine)
    for text, stops in ((f"yes{mine}", True), (f"yes{STOP}", False)):
        assert sampler._ends(tokenizer.encode(text)) == stops


def test_sampling_leaves_the_training_mode_as_it_was(sampler, tiny_model):
    tiny_model.train()
    assert isinstance(sampler([[1, 2]], group_size=2, temperature=1.0), Completions)
    assert tiny_model.training


def test_seeds_of_steps_and_ranks_never_meet():
    seeds = {seed_at(seed, step, rank) for seed in range(5) for step in range(200) for rank in range(4)}
    assert len(seeds) == 5 * 200 * 4


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_label_logprobs_are_those_of_a_forward_pass_over_the_labels_alone(tiny_model, tokenizer, temperature):
    labels, prompts = [121, 110, 109], [[5, 6, 7], list(range(40))]
    options = {"group_size": 3, "temperature": temperature, "seed": 3}
    recorded = Sampler(tiny_model, tokenizer, max_completion_length=12, label_ids=labels)(prompts, **options)
    plain = Sampler(tiny_model, tokenizer, max_completion_length=12)(prompts, **options)
    assert torch.equal(recorded.ids, plain.ids) and plain.label_logprobs is None
    for b, (ids, mask) in enumerate(zip(recorded.ids, recorded.mask, strict=True)):
        prompt, completion = prompts[b // 3], ids[mask].tolist()
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = (logits[:, labels] / (temperature or 1.0)).log_softmax(dim=-1)
        torch.testing.assert_close(recorded.label_logprobs[b][mask], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "bloom"])
@pytest.mark.parametrize("columns", [2, 12])
def test_label_logprobs_behind_forced_tokens_leave_no_trace(kind, tokenizer, columns):
    """Also where the prompt is repeated, and where more is forced than a completion may have."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**KINDS, **OTHERS}[kind])).eval()
    labels, prompts, forced = [121, 110, 109], [[5, 6, 7], list(range(40))], [[8, 9, 10, 11, 12], [7]]
    sampler = Sampler(model, tokenizer, max_completion_length=columns, label_ids=labels)
    plain, found = (sampler(prompts, group_size=2, temperature=0.7, seed=3, forced=it) for it in ((), forced))
    assert torch.equal(found.ids, plain.ids) and torch.equal(found.label_logprobs, plain.label_logprobs)
    assert plain.forced_logprobs is None and found.forced_logprobs.shape == (4, 2, 3)
    for b, f in [(b, f) for b in range(4) for f in range(2)]:
        with torch.no_grad():
            logits = model(torch.tensor([prompts[b // 2] + forced[f]])).logits[0, -1]
        torch.testing.assert_close(
            found.forced_logprobs[b, f], (logits[labels] / 0.7).log_softmax(dim=-1), atol=2e-4, rtol=0
        )


class Replayed:
    """A CUDA graph on a CPU: each replay writes into the tensor that the capture made."""

    def __init__(self, decoder, step):
        self.decoder, self.step = decoder, step
        step()
        self.out = decoder.logits

    def replay(self):
        known = self.decoder.logits
        self.step()
        self.out.copy_(self.decoder.logits)
        self.decoder.logits = known


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_forced_tokens_change_nothing_on_a_card(sampler, as_on_a_card, cuda_graphs, monkeypatch):
    def begin(decoder, *arguments, **options):
        make(decoder, *arguments, **options)
        decoder.capture = (lambda step: Replayed(decoder, step)) if cuda_graphs else None

    make = SharedPrompts.__init__
    monkeypatch.setattr(SharedPrompts, "__init__", begin)
    sampler.cuda_graphs, sampler.label_ids, prompts = cuda_graphs, [121, 110], [[1, 2, 3], list(range(30))]
    plain, found = (sampler(prompts, group_size=4, temperature=1.0, forced=it) for it in ((), [[7, 8, 9] * 3]))
    assert sampler.fused and torch.equal(found.ids, plain.ids)
    assert torch.equal(found.label_logprobs, plain.label_logprobs)
