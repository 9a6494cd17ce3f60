"""The policy: a causal LM and its tokenizer, from a preset, a folder or the hub."""

import os
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from grpo_ds.errors import UsageError, in_one_line
from grpo_ds.models.chat_texts import keep_chat_texts
from grpo_ds.models.embedded import embedded_folder
from grpo_ds.models.gguf_files import gguf_folder, is_gguf
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.lora import add_adapter, keep_trainable_layout, merged, quantization
from grpo_ds.models.parts import check_loaded, check_parts, check_tied, check_tokenizer
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import SHARD_BYTES, adapter_base, brings_code
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system.files import give_folders_mode
from grpo_ds.system.hub import check_hub
from grpo_ds.task.chat import ensure_chat_template

# For a hub model without safetensors, transformers would ask a hub service to convert it, with the user's account.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
transformers_logging.disable_progress_bar()  # our own lines and bars show the progress


def model_source(name: str) -> str:
    """Return the argument of from_pretrained: a preset's hub id, a converted model's folder, or the name itself."""
    if name == EMBEDDED:
        return str(embedded_folder())
    if is_gguf(name):
        return str(gguf_folder(name))
    if Path(name).is_dir():
        return name
    try:
        check_hub()
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True  # a model in the cache still loads; others fail at once, not after a minute
    return (PRESETS[name].hub_id or name) if name in PRESETS else name


def load_tokenizer(name: str, *, base: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer, with a plain chat template if the model has none, and always with a pad token.

    base: the model below an adapter; None: the one that the adapter names.
    Raises UsageError for a tokenizer that does not belong to the model.
    """
    base = base or adapter_base(name) or name
    source = base if base != name and not _has_tokenizer(Path(name)) else name  # peft saves an adapter without one
    with _named_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(model_source(source), trust_remote_code=trust_remote_code)
    _check_template_names(name, tokenizer.chat_template)
    ensure_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # EOS may be the pad token: masks decide which tokens count, not ids
    with _named_errors(base):
        config = AutoConfig.from_pretrained(model_source(base), trust_remote_code=trust_remote_code)
        own = _generation_config(model_source(base), config)
    check_tokenizer(name, tokenizer, config, own)
    keep_chat_texts(tokenizer, Path(model_source(source)))
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))


def _generation_config(source: str, config: PreTrainedConfig) -> GenerationConfig:
    """Return the generation config that from_pretrained gives the model."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_model_config(config)


def load_policy(
    name: str, *, dtype: torch.dtype, checkpointing: bool, bits: int = 16, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the model on the CPU, without dropout and with a neutral generation config; an adapter is merged.

    bits: 4 or 8 quantises the linear layers, on the GPU if there is one. trust_remote_code: run the model's own
    Python files. Weights are read from safetensors, or from a .bin file with weights_only.

    Dropout would make the ratio of the first update differ from 1. With the model's own generation config (Qwen's has
    top_k 20, top_p 0.8, repetition_penalty 1.1) the distribution of samples would differ from the log-probs;
    only its token ids are kept.
    """
    adapter_on = adapter_base(name)
    source = model_source(adapter_on or name)
    with _named_errors(adapter_on or name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _check_parts(name, source, config, trust_remote_code=trust_remote_code)
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        # SDPA if the architecture has it: transformers' default.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            quantization_config=quantization(bits, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
    model: PreTrainedModel
    model, found = loaded
    check_loaded(adapter_on or name, model, found)
    check_tied(adapter_on or name, model)
    keep_trainable_layout(model)
    if adapter_on:
        with _named_errors(name):
            model = merged(model, Path(name))
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    if checkpointing:
        # Non-reentrant: ZeRO-2 refuses a parameter whose gradient arrives twice.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_folder(name: str, *, trust_remote_code: bool = False) -> None:
    """Raise UsageError if the parts of a local folder do not belong together. No weights are read."""
    if not Path(name).is_dir():
        return
    if _has_tokenizer(Path(name)):
        load_tokenizer(name, trust_remote_code=trust_remote_code)
    source = model_source(adapter_base(name) or name)
    with _named_errors(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _check_parts(name, source, config, trust_remote_code=trust_remote_code)


def _check_parts(name: str, source: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
    """Check the weights and the adapter of `name`; source: argument of from_pretrained for its base."""
    base = Path(source) if Path(source).is_dir() else None
    check_parts(base, config, Path(name) if adapter_base(name) else None, trust_remote_code=trust_remote_code)


def trainable_policy(config: TrainConfig, *, dtype: torch.dtype, known_ids: int) -> LogprobModel:
    """Load the policy of a run, with an adapter if the flags ask for one. known_ids: number of the tokenizer's ids."""
    model = load_policy(
        config.model,
        dtype=dtype,
        checkpointing=config.gradient_checkpointing is not False,
        bits=config.base_bits,
        trust_remote_code=config.trust_remote_code,
    )
    if config.lora_r:
        source = model_source(config.model)
        add_adapter(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            base=str(Path(source).resolve()) if Path(source).is_dir() else source,  # found from any working folder
            seed=config.seed,
        )
    vocab_size = min(known_ids, model.get_output_embeddings().weight.shape[0])
    options = {"vocab_size": vocab_size, "temperature": config.temperature, "chunk_mib": config.logprob_chunk_mib}
    return LogprobModel(model, **options)


@contextmanager
def _named_errors(name: str):
    """Turn transformers' errors for a wrong name, an unreachable hub or unreadable files into one clear UsageError."""
    try:
        yield
    except UnpicklingError as error:
        raise UsageError(
            f"The model {name} has a file of weights that contains more than weights, so it was not read.\n"
            "Such a file can run code. Use the model's safetensors files, or another model."
        ) from error
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise brings_code(name) from error
        kind = "folder" if Path(name).is_dir() else "model"
        reach = "" if kind == "folder" else "If this machine cannot reach the hub, "
        raise UsageError(
            f"The {kind} {name} cannot be loaded: {in_one_line(error)}\n"
            f"{reach}{'n' if reach else 'N'}ame a folder saved by save_pretrained (--model FOLDER),\n"
            f"or use the embedded model, which needs no network: --model {EMBEDDED}"
        ) from error


def _check_template_names(name: str, templates: str | dict[str, str] | None) -> None:
    """Raise UsageError for a chat template named by a path: a saved tokenizer uses these names as file names."""
    if isinstance(templates, dict) and (paths := [key for key in templates if Path(key).name != key]):
        raise UsageError(
            f"The tokenizer of {name} names a chat template {paths[0][:80]!r}, a path outside the output folder.\n"
            "Fix chat_template in its tokenizer_config.json, or use another model."
        )


def save_merged(adapter: Path, folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
    """Save base and adapter as one ordinary model; the base is read again in `dtype`, not with the bits of training."""
    model = load_policy(str(adapter), dtype=dtype, checkpointing=False, trust_remote_code=trust_remote_code)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    give_folders_mode(folder)


@torch.no_grad()
def first_bad_weight(model: torch.nn.Module) -> str | None:
    """Return the name of the first parameter with a value that is not finite, None if all are finite.

    Reads the weights once and copies none.
    """
    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    # One transfer for all: reading each value alone would wait for the GPU every time.
    finite = torch.stack([torch.linalg.vector_norm(p, torch.inf).float() for p in weights.values()]).isfinite()
    return next((name for name, is_finite in zip(weights, finite.tolist(), strict=True) if not is_finite), None)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save an ordinary transformers folder; for a model with an adapter only the adapter, as peft writes it.

    ZeRO keeps all weights as views of one buffer. save_pretrained would treat them as shared tensors and clone all of
    them at once, in GPU memory. Passed through dlpack, each view is a separate tensor over the same bytes.
    """
    if getattr(model, "peft_config", None):
        model.save_pretrained(folder)
    else:
        weights = {name: torch.from_dlpack(tensor.detach()) for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_BYTES)
    give_folders_mode(folder)
