"""The one door to DeepSpeed: the policy under ZeRO-2, seen as forward, backward, step.

Why raw DeepSpeed and not accelerate's plugin: docs/decisions/0001-raw-deepspeed.md.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_ds.core.packing import PackedRows
from grpo_ds.errors import CheckpointError, GrpoError
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.optim.adamw8bit import build_optimizer
from grpo_ds.settings.ds_config import DsConfig

# DeepSpeed compiles small extensions on first use with ninja, which pip puts beside the interpreter:
# found there also when the environment was not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.tensor_fragment import fragment_address

# An all-reduce for inference on CPUs, which is never called here. DeepSpeed compiles it on the first run, 45 seconds
# under a lock file that a run killed meanwhile leaves behind: every later run would wait for it without end.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

Item = TypeVar("Item")
DEEPSPEED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]  # in its checkpoints, beside tensors and numbers


class Engine:
    """The policy, its optimizer and what DeepSpeed makes of them.

    A step follows one `backward`, DeepSpeed's fast path, on which a gradient leaves the card once, or several, of
    which the earlier ones accumulate in host memory, in bf16.
    seed: of stochastic rounding, where the JSON asks for it; one a rank.
    """

    def __init__(self, policy: LogprobModel, config: DsConfig, *, seed: int = 0) -> None:
        parameters = [p for p in policy.parameters() if p.requires_grad]
        logging.getLogger("DeepSpeed").addFilter(_but_of_our_optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameters,
            optimizer=_client_optimizer(parameters, config),
            config=config.engine,
        )
        self._shares_staging = config.share_staging and not config.bf16_masters
        self._offload = config.offload
        if config.offload:
            _exchange(self._engine, config, seed=seed)
        self._engine.checkpoint_engine = _SafeFiles()
        self.policy = policy

    def __call__(self, rows: PackedRows) -> Tensor:
        """[B, C] log-probs, in training mode (gradient checkpointing on)."""
        self._engine.train()
        return self._engine(rows)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Gradients of a loss that is already normalised over the whole step, micro-batches and ranks.

        last: step() comes next; gradients of earlier ones are kept and added to.
        """
        if not last and self._offload:
            _allow_accumulation(self._engine.optimizer)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, and return the gradient norm before clipping."""
        if self._shares_staging:
            _clear_unwritten_gradients(self._engine.optimizer)
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def gradient_norms(self) -> dict[str, float]:
        """Between the last backward and step(): the norm of each parameter's gradient, of what this rank keeps of it.

        One that is not finite is of a gradient that step() must not take. DeepSpeed finds that out too late, inside
        its step, and not in every layout.
        """
        norms = dict(_norms(self._engine))
        values = torch.stack([norm.float() for norm in norms.values()]).tolist() if norms else []
        return dict(zip(norms, values, strict=True))

    def gradient(self, parameter: Tensor) -> Tensor:
        """Between the last backward and step(): of all ranks together, from where step() will take it. Every rank
        calls it."""
        return safe_get_full_grad(parameter)

    def rehearse(self, micro_batches: Iterable[PackedRows]) -> None:
        """A whole step, before the first, with gradients of 0 at a learning rate of 0: uses memory, changes nothing."""
        inner, scheduler = self._engine.optimizer, self._engine.lr_scheduler
        rates, schedule = [group["lr"] for group in inner.param_groups], scheduler and scheduler.state_dict()
        counted = self._engine.global_steps, self._engine.global_samples
        for group in inner.param_groups:
            group["lr"] = 0.0
        for rows, last in flag_last(micro_batches):
            self.backward(0 * self(rows).sum(), last=last)
        self.step()
        for state in getattr(inner, "optimizer", inner).state.values():
            state["step"] *= 0  # a tensor in some optimizers
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        if scheduler:
            scheduler.load_state_dict(schedule)
        self._engine.global_steps, self._engine.global_samples = counted

    def abandon(self) -> None:
        """Forget the gradients of this step, also of a backward that failed half-way; the next step starts clean."""
        zero = self._engine.optimizer
        self._engine.zero_grad()
        zero.zero_grad(set_to_none=True)
        if isinstance(zero, ZeROOptimizer):
            zero._backward_active_depth = 0
            zero.clear_backward_seen_flag()
        if not isinstance(zero, DeepSpeedZeroOptimizer):  # stage 0: there are no gradients elsewhere
            return
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.extra_large_param_to_reduce.clear()
        zero._release_ipg_buffers()
        zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
        zero.micro_step_id = -1
        if self._offload:
            zero.reset_cpu_buffers()
            for master in zero.single_partition_of_fp32_groups:
                master.grad.zero_()  # or a parameter the next step does not reach would keep this one's
        # Until the last backward of a run's first step there are some in the second alone.
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    @property
    def model(self) -> PreTrainedModel:
        """The bare causal LM: what samples and what is saved."""
        return self.policy.model

    @property
    def learning_rate(self) -> float:
        """What the last step used."""
        return self._engine.get_lr()[0]

    def save_checkpoint(self, folder: Path, tag: str) -> None:
        """DeepSpeed's shards of the optimizer state, and an adapter's weights, in folder/tag; every rank calls it.

        Not the weights of a whole model: DeepSpeed would copy them from the card at once, and save_model writes them.
        """
        engine, states = self._engine, self._engine.module_state_dict
        if self._trains_all:
            engine.module_state_dict = lambda **_: {}
        try:
            engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        finally:
            engine.module_state_dict = states

    def load_checkpoint(self, folder: Path, tag: str) -> None:
        """What save_checkpoint wrote; every rank calls it, with a whole model's saved weights in the policy already.

        Raises CheckpointError where DeepSpeed would go on without.
        """
        weights = _keep_as_they_are if self._trains_all else _load_trained
        found, _ = self._engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=weights)
        if found is None:
            raise CheckpointError(f"{folder / tag} holds no DeepSpeed checkpoint of this run; nothing was loaded.")

    @property
    def _trains_all(self) -> bool:
        return all(parameter.requires_grad for parameter in self.policy.parameters())

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def _norms(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and norm of each gradient that the next step will take, wherever this layout keeps it, read once."""
    zero, names = engine.optimizer, engine.param_names
    if not isinstance(zero, DeepSpeedZeroOptimizer):  # in the parameters, or beside them in fp32
        for parameter, name in names.items():
            beside = getattr(parameter, "_hp_grad", None)
            if (gradient := parameter.grad if beside is None else beside) is not None:
                yield name, torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return
    for group, parameters in enumerate(zero.params_in_partition):
        if zero.cpu_offload:  # taken as each gradient left for the host
            known = zero.norm_for_param_grads
            keys = [(parameter, zero.get_param_id(parameter)) for parameter in parameters]
            yield from ((names[parameter], known[key]) for parameter, key in keys if key in known)
            continue
        gradients = [part for part in zero.averaged_gradients[group] if not getattr(part, "_zero_padding", False)]
        for parameter, gradient in zip(parameters, gradients, strict=False):  # a rank may own none, and holds a zero
            yield names[parameter], torch.linalg.vector_norm(gradient, dtype=torch.float32)


class _SafeFiles(TorchCheckpointEngine):
    """DeepSpeed's files, read without pickle's power to run code, and page by page instead of whole."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # what can be mapped

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)


def _keep_as_they_are(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    """A whole model's weights came with the model."""


def _load_trained(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    """An adapter's weights alone: its base is not in the checkpoint, and bitsandbytes loads no quantised one."""
    trained = {name: parameter for name, parameter in dst.named_parameters() if parameter.requires_grad}
    if missing := trained.keys() - src.keys():
        raise CheckpointError(f"The checkpoint lacks {len(missing)} weights of this adapter, such as {min(missing)}.")
    for name, parameter in trained.items():
        parameter.data.copy_(src[name])


def flag_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether it is the last."""
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting, False
        waiting = item
    if waiting is not None:
        yield waiting, True


def _but_of_our_optimizer(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of any optimizer it does not bring; ours is tested, and "proceed with caution" alarms people."""
    return "untested optimizer" not in record.getMessage()


def _client_optimizer(parameters: Sequence[Tensor], config: DsConfig) -> torch.optim.Optimizer | None:
    """What deepspeed.initialize gets; None lets DeepSpeed build its own from the JSON."""
    if config.optimizer.type != "AdamW8bit":
        return None
    if not config.bf16_masters:
        return build_optimizer(parameters, offload=config.offload, **config.optimizer.params)
    # DeepSpeed gives bf16 masters to its own Adam alone and asks for the exact type. This one passes the question
    # and is exchanged before it ever steps, so its C++ (a compiler and, beside CUDA, its toolkit) is never built.
    passport = DeepSpeedCPUAdam.__new__(DeepSpeedCPUAdam)
    torch.optim.Optimizer.__init__(passport, parameters, {**config.optimizer.params, "amsgrad": False})
    return passport


def _exchange(engine: Any, config: DsConfig, *, seed: int) -> None:
    """Everything we replace inside DeepSpeed, right after its initialize: the host ladder and waste on the card.

    bf16 masters: our optimizer for DeepSpeed's, and the masters themselves for their bf16 staging copy.
    fp32 masters: the staging copy, written when the optimizer has used the gradients, moves into their memory.
    Both: buffers of the largest parameter that are never read, and a gradient norm without a copy in fp64.
    Raises GrpoError where DeepSpeed's insides are not those of 0.19.
    """
    zero = engine.optimizer
    _check_insides(engine, bf16_masters=config.bf16_masters)
    masters, staging = zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups
    if config.bf16_masters and config.optimizer.type == "AdamW8bit":
        # With the learning rate of each group, which a schedule has set by now.
        groups = [{key: group[key] for key in ("params", "lr")} for group in zero.optimizer.param_groups]
        settings = {**config.optimizer.params, "rounding": config.rounding, "seed": seed}
        zero.optimizer = engine.basic_optimizer = build_optimizer(groups, offload=True, **settings)
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.optimizer = zero.optimizer
        staging[:] = [master.data for master in masters]  # DeepSpeed's copy from one to the other is then none
    elif config.share_staging:
        staging[:] = [m.grad.view(-1).view(copy.dtype)[: m.numel()] for m, copy in zip(masters, staging, strict=True)]
    zero.temp_grad_buffer_for_cpu_offload = torch.empty(0)
    zero.temp_grad_buffer_for_gpu_offload = torch.empty(0)  # until _allow_accumulation
    zero.set_norm_for_param_grad_in_gpu = lambda parameter: _set_norm(zero, parameter)
    zero._has_inf_or_nan = lambda tensor: ~torch.linalg.vector_norm(tensor, torch.inf).isfinite()


def _check_insides(engine: Any, *, bf16_masters: bool) -> None:
    """What _exchange, _set_norm and _clear_unwritten_gradients rely on, looked at before anything is touched."""
    zero, dtype = engine.optimizer, torch.bfloat16 if bf16_masters else torch.float32
    try:
        masters, staging = zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups
        as_known = (
            zero.optimizer is engine.basic_optimizer
            and len(masters) == len(staging) == len(zero.optimizer.param_groups) == len(zero.offload_gradient_dict)
            and all(master.dtype == master.grad.dtype == dtype for master in masters)
            and all(m.shape == m.grad.shape == copy.shape for m, copy in zip(masters, staging, strict=True))
            and all(group["params"][0] is m for group, m in zip(zero.optimizer.param_groups, masters, strict=True))
            and not any(map(any, zero.round_robin_bit16_padding))  # paddings between parameters would be overwritten
            and {"set_norm_for_param_grad_in_gpu", "_has_inf_or_nan"} <= set(dir(zero))
            and zero.norm_for_param_grads == {}
            and zero.temp_grad_buffer_for_cpu_offload.shape == zero.temp_grad_buffer_for_gpu_offload.shape
        )
    except (AttributeError, TypeError, ValueError):
        as_known = False
    if not as_known:
        raise GrpoError(
            f"DeepSpeed {deepspeed.__version__} keeps its offloaded masters, gradients and staging copy in another way "
            "than 0.19.8,\nso they cannot be made smaller safely. Install the version that is known to work: "
            "pip install deepspeed==0.19.8"
        )


def _allow_accumulation(zero: Any) -> None:
    """The buffer on the card that several backwards a step need, and one does not."""
    if zero.temp_grad_buffer_for_gpu_offload.numel() == 0:
        largest = max((p for group in zero.bit16_groups for p in group), key=Tensor.numel)
        zero.temp_grad_buffer_for_gpu_offload = torch.zeros(largest.numel(), dtype=largest.dtype, device=largest.device)


def _set_norm(zero: Any, parameter: Tensor) -> None:
    """A gradient's norm, accumulated in fp32; DeepSpeed's casts the gradient to fp64 first, 2.5 GB for a 3B model's."""
    key = zero.get_param_id(parameter)
    _, start, _, length = zero.grad_position[key]
    gradient = zero.get_param_gradient_attribute(parameter).view(-1).narrow(0, start, length)
    zero.norm_for_param_grads[key] = torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _clear_unwritten_gradients(zero: Any) -> None:
    """A parameter no backward reached has a gradient of 0, not the bytes of the staging copy that went before."""
    for group, parameters in enumerate(zero.params_in_partition):
        for parameter, gradient in zip(parameters, zero.offload_gradient_dict[group], strict=True):
            if zero.get_param_id(parameter) not in zero.norm_for_param_grads:
                gradient.zero_()
