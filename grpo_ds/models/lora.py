"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023): small trained matrices beside a frozen base.

peft adds them to the transformers model itself, so sampling, log-probs and DeepSpeed use it like any other model.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from grpo_ds.models.parts import quiet
from grpo_ds.models.shapes import ALL_LINEAR

ADAPTER = "default"  # peft's name for an adapter without one


def add_adapter(
    model: PreTrainedModel, *, r: int, alpha: int, targets: Sequence[str], base: str, seed: int = 0
) -> None:
    """Freeze `model` and add alpha / r * B A to each targeted weight; B starts at 0, so nothing changes yet.

    base: this model's name or folder for from_pretrained, written into the saved adapter. seed: for A.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else list(targets),
        lora_dropout=0.0,  # would make the ratio of the first update differ from 1
        fan_in_fan_out=getattr(model.config, "model_type", "") == "gpt2",  # Conv1D; otherwise peft warns and sets it
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config)
    model.peft_config[ADAPTER].base_model_name_or_path = base  # type: ignore[index]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapter in `folder` to the weights of `model`; the result is an ordinary model that can be trained."""
    with quiet():
        of_both = PeftModel.from_pretrained(model, folder).merge_and_unload()
    # peft freezes the base below an adapter, and merging does not undo that.
    return of_both.requires_grad_(True)  # type: ignore[operator]


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' config for a frozen base: linear layers quantised, embeddings and head in `dtype`."""
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if bits == 8:
        # It logs for every product that activations are rounded; docs/lora.md says so.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 16:
        return None
    raise ValueError(f"bits is {bits}; it must be 4, 8 or 16.")


def keep_trainable_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, which it does on CPUs with AVX-512 bf16.

    It packs them in the first evaluation pass (0.50.2), and no gradient goes through packed weights afterwards.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
