"""GGUF files, llama.cpp's format: converted once into an ordinary transformers folder in the user's cache.

Weights become bf16, whatever the file holds, and the chat template and the token ids come along. A file holds no code.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from grpo_ds.errors import UsageError, in_one_line
from grpo_ds.system.files import give_folders_mode

SUFFIX = ".gguf"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
SPLIT = "split.count"  # key of a file that is one of several
DAMAGED = (
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    OSError,
)  # what the reader raises for a file that is no GGUF


def cache_folder() -> Path:
    """Return the folder of converted models."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_ds"


def is_gguf(model: str) -> bool:
    """True if this names a GGUF file that is there."""
    return model.endswith(SUFFIX) and Path(model).is_file()


def gguf_folder(model: str) -> Path:
    """Return the folder of the converted file. Converts on first use; a file that has changed is converted again.

    Raises UsageError for a file that is damaged, split, or of an architecture that transformers cannot read.
    """
    file = Path(model).resolve()
    found = file.stat()
    key = hashlib.sha256(f"{file} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:12]
    return converted(file, cache_folder() / "gguf" / f"{file.stem}-{key}")


def converted(file: Path, folder: Path) -> Path:
    """Return `folder` after converting the file into it, if it is not there yet; safe with several processes."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Convert in a temporary folder, then rename it, so that it is either complete or missing."""
    tied = _check(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {file.name} into {folder} (once; half a minute for each 100 MB)", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as private:
        unfinished = Path(private) / folder.name
        unfinished.mkdir()  # with the mode of the umask
        try:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
                dtype=torch.bfloat16,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        except (*DAMAGED, NotImplementedError) as error:
            raise UsageError(
                f"--model {file} cannot be converted: {in_one_line(error)}\n"
                "Name the folder or the hub id of the same model instead."
            ) from error
        if tied:  # the two matrices of the file are one
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        give_folders_mode(unfinished)
        unfinished.rename(folder)


def _check(file: Path) -> bool:
    """Return True if the file's head is a copy of its embedding. Raises UsageError for a file that cannot be read."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UsageError(f"--model {file}: reading a GGUF file needs the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(file)
        parts = reader.fields[SPLIT].contents() if SPLIT in reader.fields else 1
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except DAMAGED as error:
        raise UsageError(
            f"--model {file} is not a complete GGUF file: {in_one_line(error)}\nDownload it again, or name a folder."
        ) from error
    if parts > 1:
        raise UsageError(
            f"--model {file} is one of {parts} files of a model.\n"
            "Join them with llama.cpp (llama-gguf-split --merge FIRST.gguf JOINED.gguf), or name the model's folder."
        )
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    return (
        head is not None and embedding is not None and head.shape == embedding.shape and bool((head == embedding).all())
    )
