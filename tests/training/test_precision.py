"""Whether torch's build runs on a card, and whether the card has bf16, as torch answers."""

import pytest
import torch

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.training.precision import check_card, runs_on

# The builds of torch 2.13 for x86, from its release notes.
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CU126, True),  # V100
        ((7, 0), CU130, False),
        ((7, 5), CU130, True),  # T4
        ((8, 9), CU130, True),  # RTX 40xx: sm_86 runs on it
        ((6, 1), CU126, True),  # GTX 10xx: sm_60
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # compiled from compute_120
        ((13, 0), CU126, False),
        ((7, 2), CU130, False),
    ],
)
def test_a_build_runs_on_later_cards_of_the_same_generation(capability, built_for, runs):
    assert runs_on(capability, built_for) == runs


def card(monkeypatch, capability, *, bf16, built_for=CU126):
    """Pretend that torch sees this card."""
    answers = {
        "is_available": lambda: True,
        "get_device_capability": lambda: capability,
        "get_device_name": lambda: "Tesla V100",
        "get_arch_list": lambda: built_for,
        "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,  # as torch does
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_a_card_that_would_emulate_bf16_is_refused_and_takes_fp16(monkeypatch):
    card(monkeypatch, (7, 0), bf16=False)
    check_card("fp16")
    check_card("fp32")
    with pytest.raises(UsageError, match=r'Tesla V100 has no bf16.*"fp16": {"enabled": true}'):
        check_card("bf16")
    card(monkeypatch, (8, 6), bf16=True)
    check_card("bf16")


def test_a_torch_without_kernels_for_the_card_is_refused(monkeypatch):
    card(monkeypatch, (7, 0), bf16=False, built_for=CU130)
    with pytest.raises(UsageError, match=r"no kernels for this card, Tesla V100 \(sm_70\)") as error:
        check_card("fp16")
    assert "cu126" in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES
