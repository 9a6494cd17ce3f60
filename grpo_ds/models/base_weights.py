"""A hash of the base that an adapter is trained on: a checkpoint keeps it, as it holds the adapter alone.

It covers every tensor, the config, the token ids that end a completion and the model's own code, but not how the
tensors are spread over files. Every byte is read once; it is then in the system's cache when the model is loaded.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo_ds.models.embedded import embedded_folder
from grpo_ds.models.gguf_files import gguf_folder, is_gguf
from grpo_ds.models.presets import EMBEDDED, PRESETS

READ_AT_ONCE = 1 << 22
THREADS = min(4, os.cpu_count() or 1)
CONFIGS = ("config.json", "generation_config.json")
OF_THE_FILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # keys that change no number of a run
Piece = tuple[str, Path, int, int]  # name, file, its first byte and the byte after its last


def base_hash(model: str) -> str | None:
    """Return the hash of a model on this machine: a folder, or one of the hub's cache.

    None if it is not here or cannot be read, which loading it reports.
    """
    try:
        if (folder := model_folder(model)) is None:
            return None
        settings, pieces = {name: _settings(folder / name) for name in CONFIGS}, sorted(_pieces(folder))
        with ThreadPoolExecutor(THREADS) as pool:  # hashing does not hold Python's lock
            hashes = list(pool.map(_hash, pieces))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None
    listed = [settings, [(name, hashed) for (name, *_), hashed in zip(pieces, hashes, strict=True)]]
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def model_folder(model: str) -> Path | None:
    """Return the folder of a model on this machine, in the hub's cache or anywhere else; None if it is not here."""
    if model == EMBEDDED:
        return embedded_folder()
    if is_gguf(model):
        return gguf_folder(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    hub_id = PRESETS[model].hub_id if model in PRESETS else model
    try:
        file = try_to_load_from_cache(str(hub_id), CONFIGS[0])
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(file).parent if isinstance(file, str) else None


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    settings = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key not in OF_THE_FILE}


def _pieces(folder: Path) -> Iterator[Piece]:
    """Yield the tensors of the safetensors files that transformers would load, other files as they are."""
    code, old = sorted(folder.glob("*.py")), sorted(folder.glob("pytorch_model*.bin"))
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [one] if one.is_file() else []
    if not files and index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        yield from _tensors(file)
    for file in [*code, *([] if files else old)]:
        yield file.name, file, 0, file.stat().st_size


def _tensors(file: Path) -> Iterator[Piece]:
    """Yield the tensors of a safetensors file: 8 bytes with the length of a JSON header, the header, the data."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file} has no header")
        header = json.loads(opened.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            yield f"{name} {tensor['dtype']} {tensor['shape']}", file, 8 + length + first, 8 + length + last


def _hash(piece: Piece) -> str:
    _, file, first, last = piece
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(first)
        while first < last and (block := opened.read(min(READ_AT_ONCE, last - first))):
            hashed.update(block)
            first += len(block)
    return hashed.hexdigest()
