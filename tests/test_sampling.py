"""Sampling: what ends a completion, what is masked, what is never drawn."""

import pytest
import torch

from grpo_ds.sampling import STOP, Completions, Sampler, StopAfterAnswer, seed_at


@pytest.fixture
def sampler(tiny_model, tokenizer):
    return Sampler(tiny_model, tokenizer, max_completion_length=12)


def greedy_alone(model, prompt, steps, known):
    """The oracle: full forward over the whole text for every token."""
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
        sampler.prompts_at_once = at_once
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


def cut(sampler, rows, stop_lengths=None):
    ids = torch.tensor(rows)
    stop = StopAfterAnswer(sampler.tokenizer, sampler.may_close, prompt_width=0)
    if stop_lengths:
        stop.length = torch.tensor(stop_lengths)
    return sampler._cut(ids, stop)


def test_the_first_eos_is_trained_and_nothing_after_it(sampler, tokenizer):
    eos = tokenizer.eos_token_id
    completions = cut(sampler, [[1, 2, eos, 0, 0], [eos, 3, 3, 3, 3], [1, 2, 3, 4, 5]])
    assert completions.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert completions.ended.tolist() == [True, True, False]  # the third ran into the length limit


def test_pad_doubling_as_eos_changes_nothing(sampler, tokenizer):
    eos = tokenizer.eos_token_id
    assert cut(sampler, [[1, eos, eos, eos]]).mask.int().tolist() == [[1, 1, 0, 0]]


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
    ids = torch.tensor([tokenizer.encode(text)])
    stop = StopAfterAnswer(tokenizer, sampler.may_close, prompt_width=0)
    assert stop(ids, None).tolist() == [stops]


def test_the_prompts_own_tags_do_not_end_a_row(sampler, tokenizer):
    prompt = tokenizer.encode(f"<answer>no{STOP}")
    stop = StopAfterAnswer(tokenizer, sampler.may_close, prompt_width=len(prompt))
    assert not stop(torch.tensor([[*prompt, 1]]), None).any()


def test_a_row_ends_at_a_closing_tag_of_ones_own(tiny_model, tokenizer):
    mine = "</my-final-answer>"  # longer than the default's twelve tokens
    sampler = Sampler(tiny_model, tokenizer, max_completion_length=12, stop=mine)
    stop = StopAfterAnswer(tokenizer, sampler.may_close, prompt_width=0, stop=sampler.stop)
    for text, stops in ((f"yes{mine}", True), (f"yes{STOP}", False)):
        stop.length = None
        assert stop(torch.tensor([tokenizer.encode(text)]), None).tolist() == [stops]


def test_sampling_leaves_the_training_mode_as_it_was(sampler, tiny_model):
    tiny_model.train()
    assert isinstance(sampler([[1, 2]], group_size=2, temperature=1.0), Completions)
    assert tiny_model.training


def test_seeds_of_steps_and_ranks_never_meet():
    seeds = {seed_at(seed, step, rank) for seed in range(5) for step in range(200) for rank in range(4)}
    assert len(seeds) == 5 * 200 * 4
