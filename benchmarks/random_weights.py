"""Checkpoints of a preset's shape with random weights and smollm2's tokenizer: no model hub is needed.

The tokenizer comes from the folder that `make card-pack` makes, if it is there, else from the embedded model.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKED = ROOT / "dist" / "card-pack" / "smollm2-135m"


def tokenizer_folder() -> Path:
    from grpo_ds.models.embedded import embedded_folder

    return PACKED if PACKED.is_dir() else embedded_folder()


def random_model(preset: str, parent: Path, *, layers: int | None = None) -> Path:
    """Return parent/PRESET, made if it is not there: a bf16 checkpoint with `layers` layers, or as many as the preset.

    It is made in a separate process, so that its memory is free afterwards, and on a card if there is one.
    """
    folder = parent / (preset if layers is None else f"{preset}-{layers}")
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        _make(preset, unfinished, layers)
        unfinished.rename(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit("the model could not be made")
    return folder


def _make(preset: str, folder: Path, layers: int | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from grpo_ds.models.shapes import PRESET_CONFIGS

    shape = dict(PRESET_CONFIGS[preset])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # seconds instead of a minute at 3B
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder()).save_pretrained(folder)
