"""The ZeRO staging buffer and other memory inside DeepSpeed that engine.py replaces.

After each step DeepSpeed copies the fp32 masters in RAM to a bf16 staging buffer, from which they go to the GPU. Read
in DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py; docs/decisions/0004-host-ladder.md counts the bytes per parameter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from grpo_ds.errors import GrpoError
from grpo_ds.optim import build_optimizer
from grpo_ds.settings.ds_config import DsConfig


class _ClonedInRam(Tensor):
    """A tensor whose clone is in RAM."""

    def clone(self, **_: Any) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).to("cpu", copy=True)


@contextmanager
def weights_once(zero_class: Any, accelerator: Any) -> Iterator[None]:
    """Within it DeepSpeed's initialize keeps the weights on the card once, for an optimizer in RAM.

    Else it flattens them there if they fit twice, and clones the flat buffer there before it becomes masters in RAM.
    """
    partitions = zero_class.get_data_parallel_partitions

    def cloned_in_ram(zero: Any, flat: Tensor, group: int) -> list[Tensor]:
        return [part.as_subclass(_ClonedInRam) for part in partitions(zero, flat, group)]

    with (
        patch.object(accelerator, "available_memory", lambda *_: 0),  # so it flattens in RAM
        patch.object(zero_class, "get_data_parallel_partitions", cloned_in_ram),
    ):
        yield


def plain_partitions(zero: Any) -> None:
    """Replace the partitions that initialize made within `weights_once` by ordinary views of the flat buffers."""
    for group, flat in enumerate(zero.bit16_groups_flat):
        zero.parallel_partitioned_bit16_groups[group] = zero.get_data_parallel_partitions(flat, group)


def replace_staging_and_optimizer(engine: Any, config: DsConfig, *, seed: int, version: str) -> None:
    """Replace parts of DeepSpeed right after its initialize, to save RAM and GPU memory.

    bf16 masters: our optimizer replaces DeepSpeed's, and the masters themselves serve as the bf16 staging buffer.
    fp32 masters: the staging buffer, written after the optimizer has used the gradients, shares their memory.
    Both: buffers of the largest parameter that are never read are freed; the gradient norm needs no fp64 copy.
    Raises GrpoError if DeepSpeed's insides are not those of 0.19.
    """
    zero = engine.optimizer
    _check_insides(engine, version, bf16_masters=config.bf16_masters)
    masters, staging = zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups
    if config.bf16_masters and config.optimizer.ours:
        # Keeps the learning rate of each group, which a schedule has set by now.
        groups = [{key: group[key] for key in ("params", "lr")} for group in zero.optimizer.param_groups]
        settings = {**config.optimizer.params, "rounding": config.rounding, "seed": seed}
        kind = config.optimizer.type
        zero.optimizer = engine.basic_optimizer = build_optimizer(groups, kind, offload=True, **settings)
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.optimizer = zero.optimizer
        staging[:] = [master.data for master in masters]  # DeepSpeed then copies a tensor onto itself
    elif config.share_staging:
        staging[:] = [m.grad.view(-1).view(copy.dtype)[: m.numel()] for m, copy in zip(masters, staging, strict=True)]
    zero.temp_grad_buffer_for_cpu_offload = torch.empty(0)
    zero.temp_grad_buffer_for_gpu_offload = torch.empty(0)  # allocated again by allow_accumulation
    zero.set_norm_for_param_grad_in_gpu = lambda parameter: _set_norm(zero, parameter)
    zero._has_inf_or_nan = lambda tensor: ~torch.linalg.vector_norm(tensor, torch.inf).isfinite()


def _check_insides(engine: Any, version: str, *, bf16_masters: bool) -> None:
    """Check DeepSpeed's layout before anything is replaced. Raises GrpoError."""
    zero, dtype = engine.optimizer, torch.bfloat16 if bf16_masters else torch.float32
    try:
        masters, staging = zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups
        as_known = (
            zero.optimizer is engine.basic_optimizer
            and len(masters) == len(staging) == len(zero.optimizer.param_groups) == len(zero.offload_gradient_dict)
            and all(master.dtype == master.grad.dtype == dtype for master in masters)
            and all(m.shape == m.grad.shape == copy.shape for m, copy in zip(masters, staging, strict=True))
            and all(group["params"][0] is m for group, m in zip(zero.optimizer.param_groups, masters, strict=True))
            and not any(map(any, zero.round_robin_bit16_padding))  # padding between parameters would be overwritten
            and {"set_norm_for_param_grad_in_gpu", "_has_inf_or_nan"} <= set(dir(zero))
            and zero.norm_for_param_grads == {}
            and zero.temp_grad_buffer_for_cpu_offload.shape == zero.temp_grad_buffer_for_gpu_offload.shape
        )
    except (AttributeError, TypeError, ValueError):
        as_known = False
    if not as_known:
        raise GrpoError(
            f"DeepSpeed {version} stores its offloaded masters, gradients and staging buffer differently from "
            "0.19.8,\nso their memory cannot be reduced safely. Install the tested version: "
            "pip install deepspeed==0.19.8"
        )


def allow_accumulation(zero: Any) -> None:
    """Allocate the GPU buffer that several backwards per step need; a single backward needs none."""
    if zero.temp_grad_buffer_for_gpu_offload.numel() == 0:
        largest = max((p for group in zero.bit16_groups for p in group), key=Tensor.numel)
        zero.temp_grad_buffer_for_gpu_offload = torch.zeros(largest.numel(), dtype=largest.dtype, device=largest.device)


def _set_norm(zero: Any, parameter: Tensor) -> None:
    """Norm of a gradient, accumulated in fp32; DeepSpeed casts it to fp64 first: 2.5 GB for the embedding of 3B."""
    key = zero.get_param_id(parameter)
    _, start, _, length = zero.grad_position[key]
    gradient = zero.get_param_gradient_attribute(parameter).view(-1).narrow(0, start, length)
    zero.norm_for_param_grads[key] = torch.linalg.vector_norm(gradient, dtype=torch.float32)


def clear_unwritten_gradients(zero: Any) -> None:
    """Zero the gradients that no backward has written: they still hold bytes of the last staging buffer."""
    for group, parameters in enumerate(zero.params_in_partition):
        for parameter, gradient in zip(parameters, zero.offload_gradient_dict[group], strict=True):
            if zero.get_param_id(parameter) not in zero.norm_for_param_grads:
                gradient.zero_()
