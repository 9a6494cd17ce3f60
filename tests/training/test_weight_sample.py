"""The share of moved weights, from a sample: near the share of all weights, exact when few, without frozen ones."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from grpo_ds.training import weight_sample
from grpo_ds.training.weight_sample import SAMPLED, as_hex, sampled_weights, share_changed, share_moved


def model(*, width: int = 200) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(3 * width, width), nn.LayerNorm(width))


def nudge(weights: torch.Tensor, share: float) -> None:
    chosen = torch.rand(weights.shape) < share
    weights.data[chosen] += 1.0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
def test_the_sample_has_the_share_of_all_weights(share):
    trained = model()
    start, every = as_hex(sampled_weights(trained)), [p.detach().clone() for p in trained.parameters()]
    for weights in trained.parameters():
        nudge(weights, share)
    moved = torch.cat([(p != q).flatten() for p, q in zip(trained.parameters(), every, strict=True)])
    # Four deviations of a share of SAMPLED draws.
    near = 4 * (share * (1 - share) / SAMPLED) ** 0.5
    assert share_moved(start, sampled_weights(trained)) == pytest.approx(float(moved.double().mean()), abs=near)


def test_a_parameter_has_its_part_of_the_sample_and_a_frozen_one_none():
    trained = model()
    trained[0].weight.data.fill_(2.0)
    sample = sampled_weights(trained)
    sizes = [p.numel() for p in trained.parameters()]
    assert SAMPLED <= len(sample) < 2 * SAMPLED
    assert int((sample == 2).sum()) == pytest.approx(len(sample) * sizes[0] / sum(sizes), abs=2)
    trained[0].weight.requires_grad_(False)
    assert not bool((sampled_weights(trained) == 2).any())


def test_of_few_weights_all_are_in_it():
    trained = nn.Linear(3, 2)
    start = as_hex(sampled_weights(trained))
    trained.bias.data[0] += 1
    assert share_moved(start, sampled_weights(trained)) == 1 / 8


def test_bf16_weights_are_kept_exactly():
    trained = model().bfloat16()
    start = as_hex(sampled_weights(trained))
    assert share_moved(start, sampled_weights(trained)) == 0
    for weights in trained.parameters():
        weights.data += weights.data.abs() / 2048  # less than half of bf16's spacing: rounds back
    assert share_moved(start, sampled_weights(trained)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_weights_are_compared_with_the_files_of_the_start(tiny_folder, monkeypatch, dtype):
    monkeypatch.setattr(weight_sample, "AT_ONCE", 999)
    trained = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    start = as_hex(sampled_weights(trained))
    assert share_changed(trained, str(tiny_folder), start) == 0
    first, *_, last = (it for it in trained.parameters() if it.numel() > 2000)
    first.data.view(-1)[:1500] += 1
    last.data.view(-1)[-7:] += 1
    total = sum(it.numel() for it in trained.parameters())
    assert share_changed(trained, str(tiny_folder), start) == 1507 / total


def test_nothing_is_said_of_files_that_are_not_those_of_the_start(tiny_folder, tmp_path):
    trained = AutoModelForCausalLM.from_pretrained(tiny_folder)
    start = as_hex(sampled_weights(trained))
    assert share_changed(trained, str(tmp_path / "gone"), start) is None
    for weights in trained.parameters():
        weights.data += 1
    trained.save_pretrained(tmp_path)
    assert share_changed(trained, str(tmp_path), start) is None
    assert share_changed(trained, str(tmp_path), as_hex(sampled_weights(trained))) == 0
    trained.get_parameter("model.norm.weight").requires_grad_(False)
    trained.register_parameter("adapter", nn.Parameter(torch.ones(3)))
    assert share_changed(trained, str(tmp_path), as_hex(sampled_weights(trained))) is None
