"""The only interface to DeepSpeed: the policy under ZeRO-2 as forward, backward, step.

docs/decisions/0001-raw-deepspeed.md says why DeepSpeed is used directly and not through accelerate's plugin.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from grpo_ds.core.packing import PackedRows
from grpo_ds.errors import CheckpointError, UsageError
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.optim import build_optimizer
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.system import ranks
from grpo_ds.system.determinism import deterministic_kernels
from grpo_ds.training.loss_scale import LossScale
from grpo_ds.training.zero_staging import (
    allow_accumulation,
    clear_unwritten_gradients,
    plain_partitions,
    replace_staging_and_optimizer,
    weights_once,
)

# DeepSpeed compiles small extensions on first use with ninja, which pip installs beside the interpreter. This line
# finds it even if the environment was not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.tensor_fragment import fragment_address

# This all-reduce for inference on CPUs is never called here, but DeepSpeed compiles it on the first run: 45 seconds
# under a lock file, and if that run is killed meanwhile, every later run waits for the file forever.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

Item = TypeVar("Item")
DEEPSPEED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]  # allowed in its checkpoints


def on_card() -> bool:
    """Return True if DeepSpeed computes on a card."""
    return get_accelerator().device_name() != "cpu"


class Engine:
    """The policy and its optimizer under DeepSpeed.

    A step has one `backward`, DeepSpeed's fast path, in which each gradient leaves the GPU once, or several: then the
    gradients of the earlier ones accumulate in RAM in 16 bits.
    """

    def __init__(self, policy: LogprobModel, config: DsConfig, *, seed: int = 0, deterministic: bool = True) -> None:
        """seed: of stochastic rounding, if the JSON asks for it; different on each rank.

        deterministic: on a card, the same gradients from the same rows; a CPU always gives the same.
        """
        if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise UsageError(
                "fp16.enabled is true, but DeepSpeed does not compute in fp16 on this CPU.\n"
                'Write "auto" instead: bf16 or fp32, whichever this CPU computes in.'
            )
        parameters = [p for p in policy.parameters() if p.requires_grad]
        logging.getLogger("DeepSpeed").addFilter(_not_of_our_optimizer)
        once = config.offload and on_card()
        with weights_once(DeepSpeedZeroOptimizer, get_accelerator()) if once else nullcontext():
            self._engine, *_ = deepspeed.initialize(
                model=policy,
                model_parameters=parameters,
                optimizer=_client_optimizer(parameters, config),
                config=config.engine,
            )
        if once:
            plain_partitions(self._engine.optimizer)
        self.loss_scale = LossScale(self._engine.optimizer, fp16=config.precision == "fp16")
        self._shares_staging = config.share_staging and not config.bf16_masters
        self._offload = config.offload
        if config.offload:
            replace_staging_and_optimizer(self._engine, config, seed=seed, version=deepspeed.__version__)
        self._engine.checkpoint_engine = _SafeFiles()
        if config.schedule:
            # Not by the JSON: DeepSpeed's schedules begin with two steps of 0, and need a warm-up.
            self._engine.lr_scheduler = get_scheduler(
                config.schedule,
                self._engine.basic_optimizer,
                num_warmup_steps=config.warmup_steps,
                num_training_steps=config.total_steps,
            )
        self.policy = policy
        self._kernels = deterministic_kernels if deterministic else nullcontext

    def __call__(self, rows: PackedRows, *, entropy_gradient: bool = False) -> Tensor:
        """[B, C] log-probs, in training mode (gradient checkpointing on). entropy_gradient: of `policy.entropies`."""
        self._engine.train()
        with self._kernels():
            return self._engine(rows, entropy_gradient=entropy_gradient)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a loss that is already normalised over micro-batches and ranks of the step.

        last: step() comes next.
        """
        if not last and self._offload:
            allow_accumulation(self._engine.optimizer)
        self._engine.set_gradient_accumulation_boundary(last)
        with self._kernels():
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip the gradients, update the weights, and return the gradient norm before clipping."""
        if self._shares_staging:
            clear_unwritten_gradients(self._engine.optimizer)
        self._engine.step()
        self.loss_scale.count_step(overflow=False)
        return float(self._engine.get_global_grad_norm() or 0.0)

    def skip_overflow(self) -> None:
        """Drop the gradients of a step in which one is too large for fp16, and lower the loss scale."""
        self.abandon()
        self.loss_scale.count_step(overflow=True)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of this rank's part of each parameter's gradient, times the loss scale. Call before step().

        A norm that is not finite belongs to a gradient that step() must not use. DeepSpeed finds out too late, inside
        its step, and not in every layout.
        """
        norms = dict(_norms(self._engine))
        values = torch.stack([norm.float() for norm in norms.values()]).tolist() if norms else []
        return dict(zip(norms, values, strict=True))

    def gradient(self, parameter: Tensor) -> Tensor:
        """Full gradient reduced over ranks, as step() will use it. Call after the last backward, on every rank."""
        return safe_get_full_grad(parameter).float() / self.loss_scale.value

    def rehearse(self, micro_batches: Iterable[PackedRows]) -> None:
        """Take a step with gradients of 0 at a learning rate of 0: it uses the memory of a step and changes nothing."""
        inner, scheduler = self._engine.optimizer, self._engine.lr_scheduler
        rates, schedule = [group["lr"] for group in inner.param_groups], scheduler and scheduler.state_dict()
        counted = self._engine.global_steps, self._engine.global_samples
        for group in inner.param_groups:
            group["lr"] = 0.0
        for rows, last in flag_last(micro_batches):
            self.backward(0 * self(rows).sum(), last=last)
        with self.loss_scale.unchanged():
            self.step()
        for state in getattr(inner, "optimizer", inner).state.values():
            state["step"] *= 0  # a tensor in some optimizers
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        if scheduler:
            scheduler.load_state_dict(schedule)
        self._engine.global_steps, self._engine.global_samples = counted

    def abandon(self) -> None:
        """Drop the gradients of this step, even of a backward that failed half-way, so that the next starts clean."""
        zero = self._engine.optimizer
        self._engine.zero_grad()
        zero.zero_grad(set_to_none=True)
        if isinstance(zero, ZeROOptimizer):
            zero._backward_active_depth = 0
            zero.clear_backward_seen_flag()
        if not isinstance(zero, DeepSpeedZeroOptimizer):  # stage 0 has no other gradients
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
                master.grad.zero_()  # else a parameter that the next step does not reach would keep it
        # Before the last backward of a run's first step, only the second of these holds gradients.
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM itself, for sampling and saving."""
        return self.policy.model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step."""
        return self._engine.get_lr()[0]

    def save_checkpoint(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's shards of the optimizer state, and an adapter's weights; every rank calls it.

        A full model's weights are left out: DeepSpeed would copy all of them from the GPU at once, and save_model
        writes them. It would also save a frozen base's tied head and the constants of its 4-bit weights.
        """
        engine, states = self._engine, self._engine.module_state_dict
        adapter = {name: it.detach() for name, it in self.policy.named_parameters() if it.requires_grad}
        kept = {} if self._trains_all else adapter
        engine.module_state_dict = lambda **_: kept
        try:
            engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        finally:
            engine.module_state_dict = states

    def load_checkpoint(self, folder: Path, tag: str) -> None:
        """Load the files of save_checkpoint; every rank calls it, with a full model's weights in the policy already.

        Raises CheckpointError if there is nothing to load; DeepSpeed would continue silently.
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


def leave_group() -> None:
    """Leave the process group. DeepSpeed forgets the groups that it made of it, so another run may begin here."""
    if ranks.is_ours() and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    ranks.stop()


def _norms(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and norm of each gradient that the next step will use; layouts keep it in different places."""
    zero, names = engine.optimizer, engine.param_names
    if not isinstance(zero, DeepSpeedZeroOptimizer):  # kept in the parameters, or in fp32 beside them
        for parameter, name in names.items():
            beside = getattr(parameter, "_hp_grad", None)
            if (gradient := parameter.grad if beside is None else beside) is not None:
                yield name, torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return
    for group, parameters in enumerate(zero.params_in_partition):
        if zero.cpu_offload:  # computed as each gradient left the GPU
            known = zero.norm_for_param_grads
            keys = [(parameter, zero.get_param_id(parameter)) for parameter in parameters]
            yield from ((names[parameter], known[key]) for parameter, key in keys if key in known)
            continue
        gradients = [part for part in zero.averaged_gradients[group] if not getattr(part, "_zero_padding", False)]
        for parameter, gradient in zip(parameters, gradients, strict=False):  # a rank that owns none holds a zero
            yield names[parameter], torch.linalg.vector_norm(gradient, dtype=torch.float32)


class _SafeFiles(TorchCheckpointEngine):
    """Reads DeepSpeed's files without letting pickle run code, and page by page instead of at once."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # a format that can be memory-mapped

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)


def _keep_as_they_are(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    """Load nothing: a full model's weights came with the model."""


def _load_trained(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    """Load only the adapter's weights: the checkpoint has no base, and bitsandbytes cannot load a quantised one."""
    trained = {name: parameter for name, parameter in dst.named_parameters() if parameter.requires_grad}
    if missing := trained.keys() - src.keys():
        raise CheckpointError(f"The checkpoint lacks {len(missing)} weights of this adapter, such as {min(missing)}.")
    for name, parameter in trained.items():
        parameter.data.copy_(src[name])


def flag_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each item with True if it is the last."""
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting, False
        waiting = item
    if waiting is not None:
        yield waiting, True


def _not_of_our_optimizer(record: logging.LogRecord) -> bool:
    """Hide DeepSpeed's warning about an optimizer that is not its own: ours is tested, and the warning alarms users."""
    return "untested optimizer" not in record.getMessage()


def _client_optimizer(parameters: Sequence[Tensor], config: DsConfig) -> torch.optim.Optimizer | None:
    """Optimizer to hand to deepspeed.initialize; None lets DeepSpeed build its own from the JSON."""
    if not config.optimizer.ours:
        return None
    if not config.bf16_masters:
        return build_optimizer(parameters, config.optimizer.type, offload=config.offload, **config.optimizer.params)
    # DeepSpeed allows bf16 masters only with its own Adam and checks the exact type. This object passes the check and
    # is replaced before it ever steps, so its C++ (which needs a compiler and the CUDA toolkit) is never built.
    passport = DeepSpeedCPUAdam.__new__(DeepSpeedCPUAdam)
    torch.optim.Optimizer.__init__(passport, parameters, {**config.optimizer.params, "amsgrad": False})
    return passport
