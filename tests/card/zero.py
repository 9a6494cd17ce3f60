"""ZeRO-2's memory on the card, moment by moment: weights in one buffer, gradients that leave or stay.

Follows DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, on one rank, with the changes of grpo_ds/training/engine.py
and zero_staging.py: the weights of an offloaded run are there once, no buffer of the largest parameter unless a step
has several backwards, and no fp64 copy for the norm of a gradient that leaves. Method names are DeepSpeed's.
"""

import torch
from torch import Tensor, nn

from grpo_ds.settings.ds_config import DsConfig
from tests.card.recorder import CARD

BLOCK = 256  # weights that share a scale of an 8-bit moment


class Zero:
    """The card's part of ZeRO-2 for these parameters."""

    def __init__(self, parameters: list[nn.Parameter], ds: DsConfig) -> None:
        self.parameters, self.offload = parameters, ds.offload
        self.zero = ds.engine["zero_optimization"]
        self.master_dtype = torch.bfloat16 if ds.bf16_masters else torch.float32
        self.bucket: list[nn.Parameter] = []
        self.buffers: list[Tensor] = []
        self.filled = 0
        self.index = 0
        self.partition: Tensor | None = None  # gradients that stay on the card
        self.placed = 0
        self.gathered: list[Tensor] = []
        self.accumulation: Tensor | None = None
        self.last = True  # step() comes next
        self.moments: list[Tensor] = []
        self.flatten()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.process_gradients)

    def flatten(self) -> None:
        """Copy the weights into one buffer; make the masters."""
        shapes = [parameter.shape for parameter in self.parameters]
        if self.offload:  # zero_staging.py: weights_once
            count, dtype = sum(parameter.numel() for parameter in self.parameters), self.parameters[0].dtype
            for parameter in self.parameters:
                parameter.data = torch.empty(1, dtype=dtype, device=CARD)  # its weights are in RAM
            flat = torch.empty(count, dtype=dtype, device=CARD)
        else:
            flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        offset = 0
        for parameter, shape in zip(self.parameters, shapes, strict=True):
            parameter.data = flat.narrow(0, offset, shape.numel()).view(shape)
            offset += shape.numel()
        if self.offload:
            torch.zeros(max(p.numel() for p in self.parameters), dtype=flat.dtype, device=CARD)  # replaced at once
        else:
            self.masters = flat.clone().to(self.master_dtype)
            torch.zeros_like(self.masters)  # initialize_optimizer_states

    def process_gradients(self, parameter: nn.Parameter) -> None:
        self.setup_buckets()
        size, gradient = self.zero["reduce_bucket_size"], parameter.grad
        assert gradient is not None
        if self.filled + parameter.numel() > size:
            self.reduce_ipg_grads()
        if parameter.numel() > size:
            if self.offload:
                gradient.data = gradient.detach().clone()
        else:
            place = self.buffers[self.index].narrow(0, self.filled, parameter.numel())
            place.copy_(gradient.view(-1))
            gradient.data = place.view_as(gradient)
        self.bucket.append(parameter)
        self.filled += parameter.numel()

    def setup_buckets(self) -> None:
        if not self.buffers:
            number, size = 2 if self.zero["overlap_comm"] else 1, int(self.zero["reduce_bucket_size"])
            self.buffers = [torch.empty(size, dtype=self.parameters[0].dtype, device=CARD) for _ in range(number)]

    def reduce_ipg_grads(self) -> None:
        gradients = [parameter.grad for parameter in self.bucket]  # alive until the bucket is cleared
        for parameter in self.bucket:
            self.copy_grads_in_partition(parameter)
        del gradients
        self.bucket, self.filled = [], 0
        self.index = (self.index + 1) % max(1, len(self.buffers))

    def copy_grads_in_partition(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if not self.offload:
            return self.keep(gradient)
        if not self.last and self.accumulation is None:  # engine.py: allow_accumulation
            largest = max(parameter.numel() for parameter in self.parameters)
            self.accumulation = torch.zeros(largest, dtype=gradient.dtype, device=CARD)
        if self.last:
            torch.linalg.vector_norm(gradient.view(-1), dtype=torch.float32)
            torch.linalg.vector_norm(gradient, torch.inf).isfinite()
            gradient.view(-1).to(self.master_dtype)  # copied to RAM in the masters' precision
        parameter.grad = None

    def keep(self, gradient: Tensor) -> None:
        if self.partition is None:
            total = sum(parameter.numel() for parameter in self.parameters)
            self.partition, self.placed = torch.empty(total, dtype=gradient.dtype, device=CARD), 0
        place = self.partition.narrow(0, self.placed, gradient.numel())
        place.copy_(gradient.view(-1))
        gradient.data = place.view_as(gradient)
        self.placed += gradient.numel()

    def epilogue(self) -> None:
        """After a backward: independent_gradient_partition_epilogue."""
        self.reduce_ipg_grads()
        if not self.offload:
            if self.gathered:
                for kept, parameter in zip(self.gathered, self.parameters, strict=True):
                    kept.add_(parameter.grad)
            else:
                self.gathered = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self.buffers, self.partition = [], None

    def step(self) -> None:
        if self.offload:
            return
        assert self.masters is not None
        for gradient in self.gathered:
            torch.linalg.vector_norm(gradient.to(torch.float64))
        flat = torch.cat([gradient.flatten() for gradient in self.gathered])
        gradients = flat.to(self.master_dtype)
        del flat
        self.gathered.clear()
        if not self.moments:
            blocks = -(-gradients.numel() // BLOCK)
            self.moments = [torch.zeros(gradients.numel(), dtype=torch.uint8, device=CARD) for _ in range(2)]
            self.moments += [torch.zeros(blocks, device=CARD) for _ in range(2)]
        gradients.mul_(1.0)
