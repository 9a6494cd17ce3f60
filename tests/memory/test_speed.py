"""Seconds of a step: the formula of docs/performance.md, worked out by hand; and how a card is found by its name."""

from dataclasses import replace

import pytest

from grpo_ds.memory.choose import default_run
from grpo_ds.memory.select import Job
from grpo_ds.memory.speed import Card, StepSeconds, card_named, step_seconds, typical_card
from grpo_ds.models.shapes import shape_of
from tests.conftest import check_example

CARD = Card("of the test", 16, gb_per_s=1000, tflops=100, pcie=10)  # 40 TFLOPS, 600 GB/s and 7 GB/s are used


def job(**flags):
    config, ds = default_run()
    return Job(shape_of("qwen2.5-0.5b"), replace(config, generation_batch_size=8, **flags), ds)


def test_a_step_is_what_its_formula_says():
    # Qwen2.5-0.5B: 24 layers of 896 x 896 (q, o), 896 x 128 (k, v) and 3 x 896 x 4864 = 357,826,560; the head has
    # 151,936 x 896 = 136,134,656. 2 questions, 4 completions, 768 + 300 tokens; 494,032,768 parameters.
    body, head, parameters = 357_826_560, 136_134_656, 494_032_768
    found = step_seconds(job(gradient_checkpointing=True), CARD)
    cache = 2 * 2 * 24 * 2 * 64 * (768 * 2 + 8 * 150)  # keys and values of 2 heads of 64, in 2 bytes
    token = (2 * parameters + cache) / 600e9
    assert found.sample == pytest.approx(2 * body * 2 * 768 / 40e12 + 300 * token)
    forward = 2 * (body * 2 * (768 + 4 * 299) + head * 8 * 300) / 40e12
    assert (found.reference, found.update) == pytest.approx((forward, 4 * forward))
    assert found.step == pytest.approx(4 * parameters / 7e9 + parameters / 0.7e9)
    assert found.total == pytest.approx(found.sample + found.reference + found.update + found.step)


def test_what_a_run_leaves_out_takes_no_time():
    full = step_seconds(job(gradient_checkpointing=True), CARD)
    assert step_seconds(job(gradient_checkpointing=False), CARD).update == pytest.approx(full.update * 3 / 4)
    assert step_seconds(job(beta=0.0), CARD).reference == 0
    adapter = step_seconds(job(lora_r=16), CARD)
    assert adapter.update == pytest.approx(full.update * 3 / 4) and adapter.step < full.step / 20
    assert step_seconds(job(lora_r=16, load_in_4bit=True), CARD).sample > adapter.sample
    assert step_seconds(job(reference="bf16-cpu"), CARD) is None


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("rtx 3060", "RTX 3060"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", None),  # another chip
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4060", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(name, card):
    found = card_named(name)
    assert (found and found.name) == card


@pytest.mark.parametrize(
    ("gib", "card"), [(2, "RTX 3070"), (11.6, "RTX 3060"), (16, "RTX 4060 Ti"), (23.6, "RTX 3090")]
)
def test_another_card_is_taken_for_a_common_one_of_its_size(gib, card):
    assert typical_card(gib).name == card


@pytest.mark.parametrize("cls", [Card, StepSeconds])
def test_examples(cls):
    check_example(cls)
