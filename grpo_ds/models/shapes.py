"""A model's shape, read only from its config: its matrices and their sizes.

Standard library only for Llama, Mistral, Qwen2, Qwen3 and GPT-2; other architectures are counted on torch's meta
device, which takes seconds and is equally exact. Sizes that the memory plan shares with modules that import torch are
defined here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ds.errors import UsageError, in_one_line, one_error
from grpo_ds.models.gguf_files import gguf_folder, is_gguf
from grpo_ds.system.hub import check_hub

# Weights that share an int8 scale. 64 divides all hidden sizes in use; 128 saves 1.5 % of memory, raises the KL floor.
SCALE_GROUP = 64
MIN_SCALE_GROUP = 16  # for odd widths: with smaller groups the scales would cost more than they save
QUANTIZE_BYTES = {2: 9, 4: 5}  # models/quantized.py, per weight of that size: its fp32 copy, the quotient, the code
LARGEST_LAYER = 40_000  # output rows: more than in any hidden layer, fewer than in any vocabulary in use
AHEAD = 2  # layers of a streamed reference that are copied to a card before they are needed
SHARD_BYTES = 10**9  # of a file of a saved model; on its way there it is copied from the card to RAM

ALL_LINEAR = "all-linear"
ADAPTER_FILE = "adapter_config.json"  # in a folder written by peft; it names the base model

HUB_ID = re.compile(r"(?![.~])[\w.-]+(/[\w.-]+)?")
SIZES = (  # keys of a config.json that are counts
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
)
POSITIONS = "max_position_embeddings"

Matrix = tuple[int, int, int]  # output rows, input columns, how many such matrices
Linear = tuple[str, int, int, int]  # a linear layer's name within its block, and its matrix


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that memory depends on. heads: of queries; kv_heads: of keys and values.

    Example:
        >>> shape = shape_of("qwen2.5-0.5b")
        >>> shape.layers, shape.hidden, shape.parameters
        (24, 896, 494032768)
    """

    name: str
    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # the head is the embedding
    matrices: tuple[Matrix, ...]  # linear layers and embeddings, a tied head once
    linears: tuple[Linear, ...]  # linear layers of the blocks, which LoRA adapts and QLoRA quantises
    vectors: int  # elements of all norms and biases
    positions: int | None = None  # tokens of a row that the model was made for; None: no limit is known
    learned_positions: bool = False  # a longer row is an error, not only worse
    positions_key: str = POSITIONS  # of config.json

    @property
    def parameters(self) -> int:
        return self.vectors + sum(rows * columns * count for rows, columns, count in self.matrices)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(rows * columns for rows, columns, _ in self.matrices)

    @property
    def widest(self) -> int:
        """Elements of the largest matrix of a layer, which exists in 16 bits while an int8 layer multiplies."""
        return max(rows * columns for rows, columns, _ in self.matrices if rows <= LARGEST_LAYER)

    @property
    def in_a_layer(self) -> int:
        """Elements of the matrices of one layer."""
        return sum(rows * columns for _, rows, columns, _ in self.linears)

    def lora_parameters(self, r: int, targets: Sequence[str]) -> int:
        """Elements of A [r, columns] and B [rows, r] of every targeted layer. Raises UsageError for an unknown name."""
        names = sorted({name for name, *_ in self.linears})
        if unknown := [target for target in targets if target not in (*names, ALL_LINEAR)]:
            raise UsageError(
                f"--lora_target names {', '.join(unknown)}, which no block of {self.name} has.\n"
                f"Available: {', '.join(names)}; or all of them: --lora_target {ALL_LINEAR}"
            )
        targeted = [linear for linear in self.linears if linear[0] in targets or ALL_LINEAR in targets]
        return sum(r * (rows + columns) * count for _, rows, columns, count in targeted)

    def base_bytes(self, bits: int, itemsize: int) -> int:
        """Bytes of a frozen base under bitsandbytes: linear layers in 4 or 8 bits, the rest at `itemsize`."""
        if bits == 16:
            return self.parameters * itemsize
        weights = sum(rows * columns * count for _, rows, columns, count in self.linears)
        # NF4: half a byte per weight, a one-byte code for 64 weights, an fp32 scale for 256 of those codes (Dettmers et
        # al. 2023, double quantisation). LLM.int8: a byte per weight and an fp32 scale per row.
        rows = sum(rows * count for _, rows, _, count in self.linears)
        small = int(weights * (1 / 2 + 1 / 64 + 4 / (64 * 256))) if bits == 4 else weights + 4 * rows
        return small + (self.parameters - weights) * itemsize

    def int8_bytes(self, itemsize: int) -> int:
        """Bytes under models/quantized.py: a byte per weight, a scale per group of inputs; norms and biases stay."""
        scales = sum(rows * (columns // scale_group(columns)) * count for rows, columns, count in self.matrices)
        return self.parameters - self.vectors + itemsize * (scales + self.vectors)

    def llm_int8_bytes(self, itemsize: int) -> int:
        """Bytes under LLM.int8: a byte per weight, an fp32 scale per row; embeddings and head stay in 16 bits."""
        small = [matrix for matrix in self.matrices if matrix[0] <= LARGEST_LAYER]
        codes = sum(rows * columns * count for rows, columns, count in small)
        return codes + 4 * sum(rows * count for rows, _, count in small) + itemsize * (self.parameters - codes)


def scale_group(columns: int) -> int:
    """Number of neighbouring inputs that share an int8 scale."""
    group = math.gcd(columns, SCALE_GROUP)
    return group if group >= MIN_SCALE_GROUP else columns


def qwen25(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, *, vocab: int = 151_936, tied: bool = True):
    """Return the part of a Qwen2.5's config.json that describes its shape."""
    return {
        "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
    }  # fmt: skip


PRESET_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": qwen25(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": qwen25(1536, 28, 12, 2, 8960),
    "qwen2.5-3b": qwen25(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": qwen25(3584, 28, 28, 4, 18944, vocab=152_064, tied=False),
    "smollm2-135m": {
        **qwen25(576, 30, 9, 3, 1536, vocab=49_152),
        "model_type": "llama",
        "max_position_embeddings": 8192,
    },
}


def shape_of(model: str, *, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of a preset, a folder with a config.json or a hub id. Raises UsageError without a config.

    trust_remote_code: the model's own code may be run to build it.
    """
    config = PRESET_CONFIGS.get(model) or read_config(model)
    _check_sizes(model, config)
    family = FAMILIES.get(str(config.get("model_type")))
    try:
        return family(model, config) if family else meta_shape(model, config, trust_remote_code=trust_remote_code)
    except (KeyError, TypeError):  # a missing key, or null, has the default of its config class
        return meta_shape(model, config, trust_remote_code=trust_remote_code)


def _check_sizes(model: str, config: Mapping[str, Any]) -> None:
    """Raise UsageError for counts that are not positive whole numbers. null is a default, a list has one per layer."""
    given = [(key, config[key]) for key in SIZES if not isinstance(config.get(key), list | None)]
    if wrong := [f"{key} is {json.dumps(size)[:60]}" for key, size in given if type(size) is not int or size < 1]:
        file = Path(adapter_base(model) or model) / "config.json"
        raise one_error(
            UsageError,
            f"--model {model}: {file} gives sizes that no model has:",
            wrong,
            "Each must be a whole number above 0, as save_pretrained wrote it.",
        )


def read_config(model: str) -> dict[str, Any]:
    """Read the config.json of a folder, of a converted GGUF file, or of a hub id from the cache or the hub."""
    if is_gguf(model):
        model = str(gguf_folder(model))
    adapter, base = model, adapter_base(model)
    model = base or model
    if not base and (fault := _fault(model)):
        raise UsageError(
            f"--model {model} {fault}.\n"
            f"Name a folder saved by save_pretrained, a GGUF file, a hub id, or a preset: {', '.join(PRESET_CONFIGS)}"
        )
    if model in PRESET_CONFIGS:
        return PRESET_CONFIGS[model]
    file = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            check_hub()
            offline = False
        except (OSError, ValueError):
            offline = True
        try:
            file = Path(hf_hub_download(model, "config.json", local_files_only=offline))
        except (OSError, ValueError) as error:
            reason = in_one_line(error, 150)
            if base:
                raise _lost_base(adapter, base, f"cannot be loaded: {reason}") from None
            parent = Path(model).parent
            near = f"The folder {parent} has none of this name. " if parent.is_dir() else ""
            raise UsageError(
                f"--model {model} is not a preset or a folder, and its config.json cannot be loaded: {reason}\n"
                f"{near}Presets: {', '.join(PRESET_CONFIGS)}"
            ) from None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {model}: {file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--model {model}: {file} does not hold a JSON object")
    return config


def adapter_base(model: str) -> str | None:
    """Return the base model named in an adapter's folder, None for any other model.

    Raises UsageError if an adapter names no base, or one that cannot be an ordinary model.
    """
    file = Path(model) / ADAPTER_FILE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UsageError(f"--model {model}: {file} names no base model (base_model_name_or_path).")
    if (Path(base) / ADAPTER_FILE).is_file():
        raise _lost_base(model, base, "is an adapter itself")
    if fault := _fault(base):
        raise _lost_base(model, base, fault)
    return base


def _fault(model: str) -> str | None:
    """Return why this is no folder with a config.json, preset or hub id; None if it may be one."""
    if Path(model).is_dir():
        return None if (Path(model) / "config.json").is_file() else "is a folder without config.json"
    return None if model in PRESET_CONFIGS or HUB_ID.fullmatch(model) else "is not there"


def _lost_base(adapter: str, base: str, fault: str) -> UsageError:
    return UsageError(
        f"--model {adapter} is an adapter, and {ADAPTER_FILE} in that folder names its base: {base}\n"
        f"This {fault}.\n"
        "Write there (base_model_name_or_path) the whole path of the folder, or the hub id, of the ordinary model\n"
        "that the adapter was trained on."
    )


def gated_shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Shape of Llama, Mistral, Qwen2 and Qwen3: a gated MLP, RMS norms, grouped queries.

    Raises KeyError for a missing key.
    """
    kind = config["model_type"]
    hidden, layers, mlp = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads, vocab = config["num_attention_heads"], config["vocab_size"]
    kv_heads = config["num_key_value_heads"] or heads
    head_dim = config["head_dim"] if kind == "qwen3" else config.get("head_dim") or hidden // heads
    tied = config.get("tie_word_embeddings", False)
    wide, narrow = heads * head_dim, kv_heads * head_dim
    linears = (
        *(("q_proj", wide, hidden, layers), ("k_proj", narrow, hidden, layers), ("v_proj", narrow, hidden, layers)),
        *(("o_proj", hidden, wide, layers), ("gate_proj", mlp, hidden, layers), ("up_proj", mlp, hidden, layers)),
        ("down_proj", hidden, mlp, layers),
    )
    matrices = (vocab, hidden, 1 if tied else 2), *(linear[1:] for linear in linears)
    norms = 2 * hidden + (2 * head_dim if kind == "qwen3" else 0)
    biases = wide + 2 * narrow if kind == "qwen2" or config.get("attention_bias") else 0
    biases += hidden if kind != "qwen2" and config.get("attention_bias") else 0
    biases += 2 * mlp + hidden if kind == "llama" and config.get("mlp_bias") else 0
    vectors = layers * (norms + biases) + hidden
    positions = rotary_positions(config)
    return ModelShape(
        name, vocab, hidden, mlp, layers, heads, kv_heads, head_dim, tied, matrices, linears, vectors, positions
    )  # fmt: skip


def rotary_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens of a row that a model with rotary positions was made for: the config's maximum, times a rope scaling.

    None if the config names no maximum.
    """
    longest = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(longest, int):
        return None
    trained, factor = (scaling.get(key) for key in ("original_max_position_embeddings", "factor"))
    return max(longest, int((trained or longest) * factor)) if factor else longest


def longer_than_made_for(shape: ModelShape, prompt: int, completion: int) -> str | None:
    """Return a warning for rows that are longer than the model was made for, None for others.

    prompt, completion: their most tokens. Raises UsageError if the positions are learned: there are none behind the
    last.
    """
    if not shape.positions or prompt + completion <= shape.positions:
        return None
    flags = f"--max_prompt_length {prompt} and --max_completion_length {completion} make {prompt + completion}"
    room = shape.positions - completion
    half = shape.positions // 2
    remedy = f"--max_prompt_length {room}" if room > 0 else f"--max_prompt_length {half} --max_completion_length {half}"
    if shape.learned_positions:
        raise UsageError(
            f"--model {shape.name} has learned {shape.positions} positions ({shape.positions_key}), and\n"
            f"{flags}. Try {remedy}."
        )
    return (
        f"Warning: {shape.name} was made for {shape.positions} tokens ({shape.positions_key}), and\n"
        f"{flags}; beyond them a model usually gets worse. Try {remedy}."
    )


def gpt2_shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Shape of GPT-2: learned positions, biases everywhere. Raises KeyError for a missing key."""
    hidden, layers, heads, vocab = config["n_embd"], config["n_layer"], config["n_head"], config["vocab_size"]
    mlp, tied = config.get("n_inner") or 4 * hidden, config.get("tie_word_embeddings", True)
    linears = (
        *(("c_attn", 3 * hidden, hidden, layers), ("c_proj", hidden, hidden, layers)),
        *(("c_fc", mlp, hidden, layers), ("c_proj", hidden, mlp, layers)),
    )
    embeddings = (vocab, hidden, 1 if tied else 2), (config["n_positions"], hidden, 1)
    matrices = *embeddings, *(linear[1:] for linear in linears)
    vectors = layers * (4 * hidden + 3 * hidden + hidden + mlp + hidden) + 2 * hidden
    head_dim, positions = hidden // heads, config["n_positions"]
    return ModelShape(
        name, vocab, hidden, mlp, layers, heads, heads, head_dim, tied, matrices, linears, vectors, positions, True,
        "n_positions",
    )  # fmt: skip


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), gated_shape),
    "gpt2": gpt2_shape,
}


def brings_code(model: str) -> UsageError:
    """Return the error for a model that transformers supports only with the model's own code."""
    return UsageError(
        f"The model {model} brings its own Python code, which would run here with all your permissions.\n"
        "If you have read it and trust it, add --trust_remote_code. Otherwise use a model built into transformers."
    )


def meta_shape(name: str, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelShape:
    """Shape of any causal LM that transformers or the model's own trusted code can build; no weights are made."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    broken = KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, StrictDataclassError
    try:
        if "AutoConfig" in config.get("auto_map", {}):
            made = AutoConfig.from_pretrained(adapter_base(name) or name, trust_remote_code=trust_remote_code)
        else:
            made = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=trust_remote_code)
    except broken as error:  # a config that does not hold together fails anywhere in its model's code
        if "trust_remote_code" in str(error):
            raise brings_code(name) from None
        reason = in_one_line(error)
        raise UsageError(f"--model {name}: transformers builds no causal LM from its config.json: {reason}") from None
    parameters = list(model.parameters())  # contains a tied head once
    matrices = [(rows, columns, 1) for rows, columns in (p.shape for p in parameters if p.dim() == 2)]
    vectors = sum(p.numel() for p in parameters if p.dim() != 2)
    head = model.get_output_embeddings()
    linears = [
        (path.rpartition(".")[2], *module.weight.shape, 1)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    heads, hidden, vocab = made.num_attention_heads, made.hidden_size, made.vocab_size
    key, values, tokens = made.attribute_map.get(POSITIONS, POSITIONS), made.to_dict(), model.get_input_embeddings()
    positions = rotary_positions({**values, POSITIONS: values.get(key)})
    rotary = any(value for name, value in values.items() if name.startswith(("rope", "rotary")))
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    return ModelShape(
        name=name,
        vocab=vocab,
        hidden=hidden,
        mlp=getattr(made, "intermediate_size", None) or 4 * hidden,
        layers=made.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(made, "num_key_value_heads", None) or heads,
        head_dim=getattr(made, "head_dim", None) or hidden // heads,
        tied=head.weight is model.get_input_embeddings().weight,
        matrices=tuple(matrices),
        linears=tuple(linears),
        vectors=vectors,
        positions=positions,
        learned_positions=not rotary and any(positions and table.num_embeddings >= positions for table in tables),
        positions_key=key,
    )
