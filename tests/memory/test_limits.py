"""Limits that --oom_retry halves: none of them decides a number of the run."""

import pytest

from grpo_ds.memory.limits import SMALLEST_CHUNK_MIB, Limits
from grpo_ds.settings.config import TrainConfig


@pytest.mark.parametrize(("loss_type", "pack_tokens"), [("grpo", 0), ("dapo", 3000), ("bnpo", 0), ("bnpo", 3000)])
def test_tokens_are_halved_down_to_one_completion_but_not_for_bnpo_whose_loss_depends_on_them(loss_type, pack_tokens):
    config = TrainConfig(loss_type=loss_type, pack_tokens=pack_tokens)
    limits = Limits.of(config)
    first = limits.tokens
    while limits.halve("update"):
        pass
    assert limits.tokens == (first if loss_type == "bnpo" else config.longest)
    assert limits.chunk_mib <= SMALLEST_CHUNK_MIB
