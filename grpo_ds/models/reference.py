"""The reference: a frozen copy of the policy that needs one byte per weight.

It is made from the policy in memory, layer by layer, at the start of every outer iteration: nothing is read from disk
again, and no second 16-bit model exists (except with --reference bf16). With LoRA there is no second model: the
reference is the policy with an earlier state of its adapter.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo_ds.core.losses import kl_k3
from grpo_ds.core.packing import PackedRows
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.quantized import Int8Embedding, Int8Linear
from grpo_ds.models.shapes import LARGEST_LAYER
from grpo_ds.models.stored_weights import StoredWeights, weights_again
from grpo_ds.models.streamed import StreamedModel


class Reference:
    """Log-probs under the policy as it was when this object was made. DeepSpeed never sees it."""

    def __init__(self, policy: LogprobModel, kind: str) -> None:
        model = MAKERS[kind](policy.model)
        self.model = LogprobModel(model, **policy.options).eval().requires_grad_(False)
        self.device = torch.device("cpu") if kind == "bf16-cpu" else policy.model.device

    @torch.no_grad()
    def __call__(self, rows: PackedRows) -> Tensor:
        """Return log-probs [B, C] on the device of the rows; the reference may be on another."""
        return self.model(rows.to(self.device)).to(rows.input_ids.device)

    def bytes(self) -> int:
        """Return the bytes that the reference keeps in memory."""
        return sum(t.untyped_storage().nbytes() for t in _distinct(self.model))

    def state(self) -> dict[str, Tensor]:
        """Return the state that `load_state` copies into another reference of this kind."""
        return self.model.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state()`, in place."""
        self.model.load_state_dict(state)

    @torch.no_grad()
    def mix(self, policy: LogprobModel, alpha: float) -> None:
        """Move towards the policy: alpha policy + (1 - alpha) reference (Gorbatovski et al. 2024).

        One weight at a time; works only for 16-bit weights.
        """
        own = dict(self.model.named_parameters())
        for name, parameter in policy.named_parameters():
            own[name].lerp_(parameter.to(own[name].device), alpha)


class AdapterReference(Reference):
    """The policy with the adapter's weights as they were when this object was made.

    At the start of a run B = 0 adds exactly 0, so this reference is the unchanged base.
    """

    def __init__(self, policy: LogprobModel) -> None:
        self.model, self.device = policy, policy.model.device
        self.weights = [parameter.detach().clone() for parameter in _trained(policy)]

    @torch.no_grad()
    def __call__(self, rows: PackedRows) -> Tensor:
        """Return log-probs [B, C]. Only pointers are exchanged, so that ZeRO's memory stays in place."""
        trained = _trained(self.model)
        own = [parameter.data for parameter in trained]
        try:
            for parameter, weight in zip(trained, self.weights, strict=True):
                parameter.data = weight
            return self.model.eval()(rows)
        finally:
            for parameter, weight in zip(trained, own, strict=True):
                parameter.data = weight

    def state(self) -> dict[str, Tensor]:
        return {str(number): weight for number, weight in enumerate(self.weights)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for number, weight in enumerate(self.weights):
            weight.copy_(state[str(number)])

    def bytes(self) -> int:
        """Return the bytes of the adapter's copy; the policy has the base."""
        return sum(weight.nbytes for weight in self.weights)


class StreamedReference(Reference):
    """The weights of files, which pass through memory while it scores (streamed.py)."""

    def __init__(self, policy: LogprobModel, stored: StoredWeights) -> None:
        self.model, self.stored, self.device = StreamedModel(policy, stored), stored, policy.model.device

    def bytes(self) -> int:
        return 0

    def state(self) -> dict[str, Any]:
        """Return where the files are, and their hashes."""
        return {"folder": str(self.stored.folder.absolute()), "hashes": dict(self.stored.hashes)}


def make_reference(policy: LogprobModel, kind: str, store: Callable[[], StoredWeights]) -> Reference:
    """Make a reference of this kind: a key of MAKERS below, "streamed" or "adapter".

    store: finds or writes files with the policy's weights, if the reference is streamed from them.
    """
    if kind == "streamed":
        return StreamedReference(policy, store())
    return AdapterReference(policy) if kind == "adapter" else Reference(policy, kind)


def restore_reference(policy: LogprobModel, kind: str, state: dict[str, Any], *, run: Path) -> Reference:
    """Make the reference whose `state()` a checkpoint has kept. run: the run's folder. Raises CheckpointError."""

    def stored() -> StoredWeights:
        return weights_again(Path(state["folder"]), state["hashes"], run=run)

    reference = make_reference(policy, kind, stored)
    if kind != "streamed":
        reference.load_state(state)
    return reference


def _trained(policy: LogprobModel) -> list[nn.Parameter]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


@torch.no_grad()
def kl_floor(policy: LogprobModel, reference: Reference, rows: PackedRows) -> float:
    """Mean per-token k3 between the policy and its own copy: the KL at the start of training, which is not 0."""
    return float(kl_k3(policy(rows), reference(rows))[rows.mask].mean())


def _distinct(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, each storage once (tied weights share one)."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            yield tensor


def _rebuilt(policy: PreTrainedModel, replace: Callable[[Any], nn.Module]) -> PreTrainedModel:
    """Build an empty model of the policy's class and fill it, module by module, with `replace(policy's layer)`.

    Other layers (norms) and buffers are copied. Tied modules stay tied.
    """
    with init_empty_weights():
        kind = policy.config._attn_implementation
        # The policy's own class: AutoModel would ask again if the model's own code is trusted.
        model = type(policy)._from_config(policy.config, dtype=policy.dtype, attn_implementation=kind)
    replaced: dict[int, nn.Module] = {}  # address of a weight -> its module, so that a tied head is made only once
    for name, source in policy.named_modules():
        if not isinstance(source, nn.Linear | nn.Embedding | Conv1D):
            for key, tensor in (*source._parameters.items(), *source._buffers.items()):
                target = model.get_submodule(name)
                if tensor is not None and key in target._parameters:
                    target._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
                elif tensor is not None:
                    target._buffers[key] = tensor.detach().clone()
            continue
        address = source.weight.data_ptr()  # not its storage: ZeRO keeps all parameters in one
        if address not in replaced:
            replaced[address] = replace(source)
        model.set_submodule(name, replaced[address])
    return model


def _int8(source: Any) -> nn.Module:
    if isinstance(source, nn.Embedding):
        return Int8Embedding(source.weight)
    # GPT-2's Conv1D is a linear layer with a transposed weight.
    weight = source.weight.T.contiguous() if isinstance(source, Conv1D) else source.weight
    return Int8Linear(weight, source.bias)


def _llm_int8(source: Any) -> nn.Module:
    """Make a layer of bitsandbytes' LLM.int8, which keeps embeddings and the head in 16 bits."""
    if not isinstance(source, nn.Linear) or source.out_features > LARGEST_LAYER:
        return _frozen_copy(source)
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight, bias = source.weight, source.bias
    with init_empty_weights():
        layer = Linear8bitLt(source.in_features, source.out_features, bias is not None, has_fp16_weights=False)
    layer.weight = Int8Params(weight.detach().cpu().clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to(weight.device)


def _frozen_copy(source: nn.Module) -> nn.Module:
    return copy.deepcopy(source).requires_grad_(False)


MAKERS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "int8": lambda policy: _rebuilt(policy, _int8),
    "llm.int8": lambda policy: _rebuilt(policy, _llm_int8),
    "bf16": lambda policy: _rebuilt(policy, _frozen_copy),
    "bf16-cpu": lambda policy: _rebuilt(policy, _frozen_copy).cpu(),
}
