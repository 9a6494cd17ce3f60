"""Records the GPU memory of code that runs without a card: every storage that appears, and every one that goes.

The code runs on torch's meta device, whose tensors have shapes and storages but no values. `as_on_a_card` makes them
pass for CUDA tensors: `is_cuda` is true, attention takes the kernel that a card would take (kernels.py), and what
depends on values takes its largest size. Tensors in RAM are real and not counted.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.card.allocator import Event
from tests.card.kernels import WORKSPACES, attention

CARD = torch.device("meta")
aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Events of torch's allocator, in order; `marks` names the event with which each phase begins."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.marks: list[tuple[str, int]] = []
        self.paused = False
        self.counts_host = False
        self._seen: dict[int, weakref.finalize] = {}  # by the address of a live storage
        self._count = 0

    def begin(self, phase: str) -> None:
        self.marks.append((phase, len(self.events)))

    def phases(self) -> Iterator[tuple[str, int, int]]:
        """Yield the name of each phase, its first event and the one after its last."""
        ends = [start for _, start in self.marks[1:]] + [len(self.events)]
        for (name, start), end in zip(self.marks, ends, strict=True):
            yield name, start, end

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out tensors that would not be on the card."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @contextmanager
    def host_counts(self) -> Iterator[None]:
        """Count tensors in RAM as if they were on the card: their code needs their values."""
        self.counts_host = True
        try:
            yield
        finally:
            self.counts_host = False

    def on_card(self, tensor: Tensor) -> Tensor:
        """Return a counted tensor in RAM without its values; it takes over the counted allocation."""
        with self.pause():
            result = torch.empty_like(tensor, device=CARD)
            if not tensor.is_contiguous():
                result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CARD)
        if counted := self._seen.pop(tensor.untyped_storage()._cdata, None):
            _, _, (_, free), _ = counted.detach()
            self._watch(result.untyped_storage(), free)
        return result

    def hold(self, size: int) -> Callable[[], None]:
        """Record an allocation without a tensor; return the function that frees it."""
        self._count += 1
        number = self._count
        self.events.append((number, size))
        return lambda: self.events.append((number, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if (largest := LARGEST.get(func)) and (result := largest(*args, **kwargs)) is not NotImplemented:
            return self.record(result)
        if func is aten.add.Tensor and _sums_gradients(*args):
            func = aten.add_.Tensor
        frees = [self.hold(size) for size in WORKSPACES[func](*args, **kwargs)] if func in WORKSPACES else []
        result = self.record(func(*args, **kwargs))
        for free in frees:
            free()
        return result

    def record(self, result: Any) -> Any:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (leaf.device == CARD or self.counts_host):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen and storage.nbytes():
                    self._watch(storage, self.hold(storage.nbytes()))
        return result

    def _watch(self, storage: torch.UntypedStorage, free: Callable[[], None]) -> None:
        address = storage._cdata
        self._seen[address] = weakref.finalize(storage, self._gone, address, free)
        self._seen[address].atexit = False

    def _gone(self, address: int, free: Callable[[], None]) -> None:
        del self._seen[address]
        free()


def _sums_gradients(first: Any, second: Any, **options: Any) -> bool:
    """Whether autograd adds a gradient to one that nothing else uses: in place, but not under a dispatch mode."""
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if not (in_backward and isinstance(second, Tensor) and first.shape == second.shape and first.device == CARD):
        return False
    users = first._use_count(), torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    return users == OF_ONE_GRADIENT


# Users of a gradient that only autograd holds, and of its storage, as the dispatch mode sees them: with the call itself
# and the Python objects of both. A test counts them (tests/card/test_plan.py).
OF_ONE_GRADIENT = 4, 2


def _all_rows(tensor: Tensor, indices: list[Tensor | None]) -> Any:
    """Index with a mask of which every cell is set: CUDA finds its cells first, then gathers."""
    (mask,) = (index for index in indices if index is not None)
    if mask.dtype != torch.bool:
        return NotImplemented
    return tensor.new_empty(mask.numel(), *tensor.shape[mask.dim() :])


def _selected(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_empty(mask.numel())


def _all_distinct(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tensor.new_empty(tensor.numel()), torch.empty_like(tensor, dtype=torch.int64), tensor.new_empty(0)


LARGEST: dict[Any, Callable[..., Any]] = {
    aten._unique2.default: lambda tensor, *_, **__: _all_distinct(tensor) if tensor.device == CARD else NotImplemented,
    aten._to_copy.default: lambda tensor, dtype=None, device=None, **_: (
        torch.zeros(tensor.shape, dtype=dtype or tensor.dtype)
        if tensor.device == CARD and device == torch.device("cpu")
        else NotImplemented
    ),
    aten.index.Tensor: lambda tensor, indices: (
        _all_rows(tensor, indices) if len(indices) == 1 and tensor.device == CARD else NotImplemented
    ),
    aten.masked_select.default: lambda tensor, mask: (
        _selected(tensor, mask) if tensor.device == CARD else NotImplemented
    ),
    aten._local_scalar_dense.default: lambda tensor: 1.0 if tensor.device == CARD else NotImplemented,
}


def _address(tensor: Tensor) -> int:
    """Distinguish tensors by address, which on the meta device is 0 for all."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


@contextmanager
def as_on_a_card() -> Iterator[Recorder]:
    """Record what happens inside as on a card."""
    recorder = Recorder()
    with ExitStack() as stack:
        on_card = property(lambda tensor: tensor.device == CARD)
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", on_card, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", _address))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        for name in ("Stream", "current_stream"):  # a stream's work is done at once
            stack.enter_context(mock.patch.object(torch.cuda, name))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", nullcontext))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        stack.enter_context(recorder)
        yield recorder
