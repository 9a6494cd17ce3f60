"""A reference that stays on disk: the weights of its files pass through memory while it scores, and none is kept.

A pass runs the policy's own modules. Just before a layer computes, its weights are exchanged for the stored ones, and
after it the policy's come back. Only pointers move, so ZeRO's memory stays in place. On a CPU the layer computes with
the file's pages; on a card the next layers are copied on a stream of their own while one computes. Of the embedding
only the rows of the tokens are read, of the head a block of rows at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ds.core.packing import PackedRows
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.shapes import AHEAD
from grpo_ds.models.stored_weights import StoredWeights

Tensors = Mapping[str, Tensor]


class StoredRows:
    """Rows of a stored matrix as `HeadRows`: a block is copied to the device when it is asked for."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        self.weight, self.device = weight, device

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.weight[rows].to(self.device, non_blocking=True)


class StreamedModel(LogprobModel):
    """Log-probs of stored weights, through the modules of a policy that holds others."""

    def __init__(self, policy: LogprobModel, stored: StoredWeights) -> None:
        super().__init__(policy.model, **policy.options)
        self.policy, self.stored = policy, stored
        parameters = {id(it): name for name, it in self.model.named_parameters()}  # a tied weight has one name
        layers = _layers(self.model)
        self.layers = {layer: [parameters[id(it)] for it in layer.parameters()] for layer in layers}
        self.embedding: Any = self.model.get_input_embeddings()
        self.matrices = [parameters[id(it.weight)] for it in (self.embedding, self.model.get_output_embeddings())]
        listed = {*self.matrices, *(name for names in self.layers.values() for name in names)}
        self.others = [name for name in parameters.values() if name not in listed]

    @torch.no_grad()
    def forward(self, rows: PackedRows, **_: bool) -> Tensor:
        """Return log-probs [B, C]; without gradients, in evaluation mode, whatever the policy's mode was."""
        self.packs, training = self.policy.packs, self.policy.training
        self.eval()
        try:
            with self._exchanged():
                return super().forward(rows)
        finally:
            self.policy.train(training)

    @property
    def head(self) -> StoredRows:
        name = self.matrices[1]
        return StoredRows(self.stored.read([name])[name], self.model.device)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """Exchange the weights of each module for the stored ones while it computes."""
        parameters = dict(self.model.named_parameters())
        own = {name: parameter.data for name, parameter in parameters.items()}

        def give(names: Collection[str], tensors: Tensors) -> None:
            for name in names:
                parameters[name].data = tensors[name]

        padding, self.embedding.padding_idx = self.embedding.padding_idx, None  # a row that may not be there
        hooks = [
            self.embedding.register_forward_pre_hook(self._rows_of_tokens),
            self.embedding.register_forward_hook(lambda *_: give(self.matrices[:1], own)),
        ]
        ahead = _Ahead(self._onto_device, [*self.layers.values()], like=self.embedding.weight)
        for layer, names in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(lambda *_, names=names: give(names, ahead.take(names))))
            hooks.append(layer.register_forward_hook(lambda *_, names=names: give(names, own)))
        try:
            give(self.others, self._onto_device(self.others))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.embedding.padding_idx = padding
            give(parameters, own)

    def _rows_of_tokens(self, embedding: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Give the embedding the rows of the ids alone; return the ids' places among them."""
        (ids,), name = inputs, self.matrices[0]
        distinct, places = torch.unique(ids, return_inverse=True)
        rows = self.stored.read([name])[name][distinct.cpu()]
        embedding.weight.data = rows.to(self.model.device, self.model.dtype)
        return (places,)

    def _onto_device(self, names: Collection[str]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {name: it.to(device, dtype, non_blocking=True) for name, it in self.stored.read(names).items()}


class _Ahead:
    """Weights of the layers in their order; on a card a stream of its own copies the next ones."""

    def __init__(
        self, copy: Callable[[Collection[str]], dict[str, Tensor]], layers: list[list[str]], like: Tensor
    ) -> None:
        self.copy, self.layers, self.device = copy, layers, like.device
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self.under_way: dict[int, tuple[Tensors, Any]] = {}  # layer -> its copies, and the event of their end

    def take(self, names: list[str]) -> Tensors:
        """Return the weights of a layer, and begin to copy those behind it."""
        if self.stream is None:
            return self.copy(names)
        place, now = self.layers.index(names), torch.cuda.current_stream(self.device)
        for layer in range(place, min(place + AHEAD + 1, len(self.layers))):
            if layer not in self.under_way:
                with torch.cuda.stream(self.stream):
                    self.under_way[layer] = self.copy(self.layers[layer]), self.stream.record_event()
        tensors, copied = self.under_way.pop(place)
        now.wait_event(copied)
        for tensor in tensors.values():
            tensor.record_stream(now)  # or its memory could be given to a copy while the layer still computes
        return tensors


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers: the modules of the list with the most weights."""
    lists = [it for it in model.modules() if isinstance(it, nn.ModuleList)]
    return [*max(lists, key=lambda it: sum(weight.numel() for weight in it.parameters()))]
