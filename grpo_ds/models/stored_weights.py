"""Weights in safetensors files, mapped and not read: their pages are in memory only while somebody looks at them."""

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grpo_ds.errors import CheckpointError
from grpo_ds.models.base_weights import model_folder
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.parts import INDEX, WEIGHTS
from grpo_ds.models.policy import save_model
from grpo_ds.system.ranks import World


class StoredWeights:
    """The tensors of a folder that save_pretrained wrote, by name; no file stays open.

    Example: the embedding, mapped as long as `weight` lives.
        >>> stored = StoredWeights(Path("Qwen2.5-0.5B"))  # doctest: +SKIP
        >>> weight = stored.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]  # doctest: +SKIP
    """

    temporary: tempfile.TemporaryDirectory[str] | None = None  # the folder, if nobody else keeps it

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises OSError if there are no safetensors files, SafetensorError for a damaged one."""
        self.folder, index = folder, folder / INDEX
        names = {*json.loads(index.read_text())["weight_map"].values()} if index.is_file() else {WEIGHTS}
        self.places: dict[str, Path] = {}  # name -> its file
        for file in (folder / name for name in sorted(names)):
            with safe_open(file, "pt") as opened:
                self.places |= dict.fromkeys(opened.keys(), file)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Map tensors, on the CPU and in the file's dtype; the pages are let go with the last of these tensors."""
        found: dict[str, Tensor] = {}
        for file in {self.places[name] for name in names}:
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in names if self.places[name] == file}
        return found

    @torch.no_grad()
    def equal(self, model: nn.Module) -> bool:
        """Return True if each parameter of the model is its stored tensor, converted to the parameter's dtype."""
        return all(
            name in self.places and torch.equal(self.read([name])[name].to(parameter.dtype), parameter.cpu())
            for name, parameter in model.named_parameters()
        )

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """File name -> SHA-256 of its bytes, which are all read once."""
        found = {}
        for file in sorted({*self.places.values()}):
            with file.open("rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found


def store_weights(policy: LogprobModel, name: str, copy: Path | None, world: World) -> StoredWeights:
    """Return files with the policy's weights: its model's own if they are the same, else a copy; every rank calls it.

    name: the model that the policy was loaded from. copy: folder for a copy; None: a temporary one.
    """
    if own := own_weights(name, policy.model):
        return own
    if copy is None:
        temporary = tempfile.TemporaryDirectory()
        save_model(policy.model, Path(temporary.name))
        stored = StoredWeights(Path(temporary.name))
        stored.temporary = temporary  # removed with the object
        return stored
    if world.is_first:
        save_model(policy.model, copy)
    world.wait()
    return StoredWeights(copy)


def own_weights(name: str, model: nn.Module) -> StoredWeights | None:
    """Return the files of the model of this name if they hold exactly the weights that `model` has now."""
    if (folder := model_folder(name)) is None:
        return None
    try:
        stored = StoredWeights(folder)
        return stored if stored.equal(model) else None
    except (OSError, SafetensorError):  # other files than safetensors
        return None


def weights_again(folder: Path, hashes: Mapping[str, str], *, run: Path) -> StoredWeights:
    """Find the files that a checkpoint's reference was streamed from, by their hashes.

    folder: where they were. run: the run's folder, which may have moved with them. Raises CheckpointError.
    """
    found = folder
    try:
        for found in (run / folder.name, folder):
            if found.is_dir() and (stored := StoredWeights(found)).hashes == hashes:
                return stored
        why = "other weights now" if folder.is_dir() else "gone"
    except (OSError, SafetensorError) as error:
        why = f"damaged ({str(error)[:80]})"
    raise CheckpointError(
        f"The reference of this run was streamed from {folder}, which is {why}.\n"
        "Put the same files back there, or start a new run: the KL would be to another model."
    )
