"""Cards without bf16, as nvidia-smi names them: what a run is settled on, and what is refused before anything loads."""

import pytest

from grpo_ds.commands import settle as module
from grpo_ds.commands.first_lines import PRECISIONS
from grpo_ds.commands.settle import settle
from grpo_ds.errors import MAX_LINES, UsageError

QWEN = ["--model", "qwen2.5-0.5b"]


@pytest.fixture
def card(monkeypatch):
    """Function that puts a card of 16 GiB with this compute capability into the machine."""

    def put(*capability):
        monkeypatch.setattr(module, "gpu_memory_gib", lambda: 16.0)
        monkeypatch.setattr(module, "ram_gib", lambda: 32.0)
        monkeypatch.setattr(module, "compute_capability", lambda: capability)
        monkeypatch.setattr("grpo_ds.system.hardware.compute_capability", lambda: capability)

    return put


@pytest.mark.parametrize(("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 6), "bf16")])
def test_the_card_decides_the_precision(card, capability, precision):
    card(*capability)
    assert settle(QWEN).job.ds.precision == precision and PRECISIONS[precision].startswith(precision)


def test_a_plan_in_fp16_takes_the_memory_of_one_in_bf16(card):
    card(7, 5)
    fp16 = settle(QWEN).plan
    card(8, 0)
    assert fp16.peak("gpu") == settle(QWEN).plan.peak("gpu")


@pytest.mark.parametrize(
    ("capability", "flags", "words"),
    [
        ((7, 5), ["--ds", "ds_configs/zero2_lowram.json"], "this card has none: take --ds ds_configs/zero2.json"),
        ((7, 0), ["--reference", "llm.int8"], "--reference llm.int8 needs a card of compute capability 7.5"),
        ((7, 0), ["--lora_r", "8", "--load_in_8bit", "true"], "--load_in_8bit true needs a card"),
        ((6, 1), [], "compute capability 6.1; the oldest"),
    ],
)
def test_what_a_card_cannot_do_is_refused_with_what_to_take(card, capability, flags, words):
    card(*capability)
    with pytest.raises(UsageError) as error:
        settle([*QWEN, *flags])
    assert words in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    "flags",
    [["--ds", "ds_configs/zero2.json"], ["--lora_r", "8", "--load_in_4bit", "true"], ["--beta", "0"]],
)
def test_what_is_recommended_instead_is_taken(card, flags):
    card(7, 0)
    assert settle([*QWEN, *flags]).job.ds.precision == "fp16"
