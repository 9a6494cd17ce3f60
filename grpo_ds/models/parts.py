"""Parts of a model that must belong together: config, weights, tokenizer, generation config, adapter.

Checked before weights are read: the headers of safetensors name every tensor and its shape, and transformers itself
compares them with the model that config.json describes, on torch's meta device.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from grpo_ds.errors import UsageError, in_one_line, one_error
from grpo_ds.models.shapes import ADAPTER_FILE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
IN_PEFT = "base_model.model."  # prefix of the base's own tensors in an adapter's file
ANSWER = "ANSWER"  # a turn of the assistant, to see what the chat template writes after it
MARKER = re.compile(r"<\|[^<>|\s]+\|>")

Shape = tuple[int, ...]


def check_tokenizer(name: str, tokenizer: Tokenizer, config: PreTrainedConfig, own: GenerationConfig) -> None:
    """Raise UsageError for ids without a row in the embedding, and for a chat template made for other tokens.

    own: the model's generation config, whose EOS ends a completion as the tokenizer's does.
    """
    rows, ids = getattr(config.get_text_config(), "vocab_size", None), tokenizer.get_vocab()
    if rows is None:
        return
    last = max(ids, key=lambda token: ids[token])
    if ids[last] >= rows:
        raise UsageError(
            f"The tokenizer of {name} does not belong to its weights: it has ids up to {ids[last]} ({last!r}),\n"
            f"but vocab_size in config.json gives the embedding {rows} rows.\n"
            "Use the tokenizer that was saved with the weights, or add the rows and save model and tokenizer:\n"
            f"model.resize_token_embeddings({ids[last] + 1})"
        )
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    limits = [("eos_token_id", id, len(tokenizer)) for id in eos]
    limits += [(key, getattr(config, key, None), rows) for key in ("bos_token_id", "pad_token_id")]
    problems = [
        f"{key} {id}, but the {'tokenizer' if key == 'eos_token_id' else 'embedding'} has only {limit} ids"
        for key, id, limit in limits
        if isinstance(id, int) and (id >= limit or (id < 0 and key == "eos_token_id"))
    ]
    if problems:
        raise one_error(
            UsageError,
            f"config.json or generation_config.json of {name} names an id that its tokenizer lacks:",
            problems,
            f"Set it there to the tokenizer's: eos_token_id {tokenizer.eos_token_id}, "
            f"pad_token_id {tokenizer.pad_token_id}.",
        )
    if marker := _unknown_ending(tokenizer, {tokenizer.eos_token_id, *eos}):
        raise UsageError(
            f"The chat template of {name} ends a turn with {marker}, which its tokenizer does not have as a token:\n"
            "the model could not end an answer. Use the tokenizer that the template was written for, or remove the\n"
            "template (chat_template.jinja, or chat_template in tokenizer_config.json); then a plain one is used."
        )


def _unknown_ending(tokenizer: Tokenizer, eos: set[int | None]) -> str | None:
    """Return a marker like <|im_end|> that ends the assistant's turn but is no token; None if an EOS ends it."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        ending = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(ANSWER)[2]
    except Exception:  # the template refuses these turns; task/prompts.py reports what it refuses of the run's own
        return None
    if eos & {*tokenizer.encode(ending, add_special_tokens=False)}:
        return None
    return next((marker for marker in MARKER.findall(ending) if marker not in tokenizer.get_vocab()), None)


def check_parts(
    base: Path | None, config: PreTrainedConfig, adapter: Path | None = None, *, trust_remote_code: bool = False
) -> None:
    """Raise UsageError if config and weights of a folder disagree, or an adapter's tensors do not fit its base.

    base: the folder of the ordinary model, None for a model of the hub, whose weights are compared after loading.
    """
    stored = _shapes(base) if base else {}
    # A quantised model's tensors have other names in the file; a model's own code may not build on the meta device.
    plain = not hasattr(config, "quantization_config") and not hasattr(config, "auto_map")
    if not plain or not (stored or adapter):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if base and stored:
        tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
        with quiet():
            model, found = type(model).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        check_loaded(str(base), model, found)
    if adapter:
        with quiet():
            _check_adapter(adapter, model)


def check_loaded(name: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raise UsageError for the disagreements that transformers found between a model and its weights.

    found: from_pretrained's loading info. transformers fills missing tensors with random numbers and drops others.
    """
    wanted, file = model.state_dict().keys(), _weights_file(Path(name))
    problems = [
        f"{tensor} is {[*stored]} in {file}, {[*made]} by config.json{_more(found['mismatched_keys'])}"
        for tensor, stored, made in sorted(found["mismatched_keys"])[:1]
    ]
    for tensor in sorted(found["missing_keys"])[:1]:
        problems.append(f"{file} lacks {tensor}{_more(found['missing_keys'])}, which would be random numbers")
    surplus = [tensor for tensor in sorted(found["unexpected_keys"]) if _has_place(tensor, wanted)]
    for tensor in surplus[:1]:
        problems.append(f"config.json has no place for {tensor}{_more(surplus)} of {file}")
    if problems:
        raise one_error(
            UsageError,
            f"config.json and {file} of {name} do not belong together:",
            problems,
            "Take both from one folder of save_pretrained, or correct config.json where its sizes are wrong.",
        )


def check_tied(name: str, model: PreTrainedModel) -> None:
    """Raise UsageError if the config promises that the head is the embedding, and the weights hold another one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False) and head.weight is not embedding.weight:
        raise UsageError(
            f"config.json and {_weights_file(Path(name))} of {name} do not belong together: tie_word_embeddings is\n"
            "true, but the weights hold a head that is not the embedding.\n"
            "To keep this head, set tie_word_embeddings to false in config.json."
        )


def _more(tensors: Sequence[Any]) -> str:
    return f" ({len(tensors) - 1} more like it)" if len(tensors) > 1 else ""


def _has_place(tensor: str, wanted: Iterable[str]) -> bool:
    """True for a part that the model has elsewhere: another layer, or a bias of a layer without one.

    Anything else is another model's part, such as a value head, which transformers reports and leaves out.
    """
    patterns = {re.sub(r"\d+", "N", name) for name in wanted}
    modules = {pattern.rpartition(".")[0] for pattern in patterns}
    pattern = re.sub(r"\d+", "N", tensor)
    return pattern in patterns or pattern.rpartition(".")[0] in modules


def _check_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Raise UsageError for an adapter that cannot be merged into this model, on the meta device."""
    config = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise UsageError(
            f"The adapter in {folder} is of peft's kind {kind}, which adds tokens, not weights: it cannot be merged.\n"
            f"Use its base, --model {config.base_model_name_or_path}, or an adapter that peft can merge, such as LoRA."
        )
    if not any((folder / file).is_file() for file in ADAPTER_WEIGHTS):  # peft would look for a hub id of this name
        raise UsageError(
            f"The adapter in {folder} has no weights: {ADAPTER_WEIGHTS[0]} is missing.\n"
            f"Copy it there, or use the adapter's base, --model {config.base_model_name_or_path}."
        )
    stored = {name: tensor.shape for name, tensor in load_peft_weights(str(folder), device="cpu").items()}
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others, such as pissa, compute from weights that are not there
    own = {f"{IN_PEFT}{name}": tensor.shape for name, tensor in model.state_dict().items()}
    try:
        adapted = PeftModel(model, config)  # type: ignore[arg-type]
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except ValueError as error:  # no layer has the names of its target_modules
        raise UsageError(
            f"The adapter in {folder} does not fit its base {config.base_model_name_or_path}: "
            f"{in_one_line(error, 150)}\nName in {ADAPTER_FILE} the base that it was trained on."
        ) from None
    shapes = {**own, **{name: tensor.shape for name, tensor in wanted.items()}}
    problems = []
    for name, shape in stored.items():
        made = shapes.get(name.replace(".base_layer", ""))  # an adapter of the embedding holds the embedding as well
        if made != shape:
            problems.append(f"{name} is {[*shape]}, {f'by the base {[*made]}' if made else 'which the base lacks'}")
    problems += [f"{name} is missing" for name in wanted if name not in stored]
    if problems:
        raise one_error(
            UsageError,
            f"The adapter in {folder} does not fit its base {config.base_model_name_or_path}:",
            [f"{problems[0]}{_more(problems)}"],
            f"Name in {ADAPTER_FILE} (base_model_name_or_path) the base that it was trained on.",
        )


def _weights_file(folder: Path) -> str:
    return next((file for file in (WEIGHTS, INDEX) if (folder / file).is_file()), "the file of weights")


def _shapes(folder: Path) -> dict[str, Shape]:
    """Return the shape of every tensor in the folder's safetensors, from their headers; empty without such files."""
    shapes: dict[str, Shape] = {}
    if (file := _weights_file(folder)) == INDEX:
        files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    else:
        files = {file} if file == WEIGHTS else set()
    for file in sorted(files):
        with safe_open(folder / file, "pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' table of disagreements, which are reported by us, and notices between it and peft."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
