"""The one door to DeepSpeed: the policy under ZeRO-2, seen as forward, backward, step.

Why raw DeepSpeed and not accelerate's plugin: docs/decisions/0001-raw-deepspeed.md.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_ds.core.packing import PackedRows
from grpo_ds.ds_config import DsConfig
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.optim.adamw8bit import build_optimizer

# DeepSpeed compiles small extensions on first use with ninja, which pip puts beside the interpreter:
# found there also when the environment was not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed


class Engine:
    """The policy, its optimizer and what DeepSpeed makes of them.

    backwards_per_step: `backward` calls that one `step` follows. With 1, DeepSpeed's fast path, a
    gradient leaves the card once; with more it accumulates in host memory, in bf16.
    """

    def __init__(self, policy: LogprobModel, config: DsConfig, *, backwards_per_step: int = 1) -> None:
        optimizer = None
        if config.optimizer.type == "AdamW8bit":
            parameters = [p for p in policy.parameters() if p.requires_grad]
            optimizer = build_optimizer(parameters, offload=config.offload, **config.optimizer.params)
        settings = {**config.engine, "gradient_accumulation_steps": backwards_per_step}
        settings["train_batch_size"] *= backwards_per_step
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=[p for p in policy.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=settings,
        )
        self.policy = policy

    def __call__(self, rows: PackedRows) -> Tensor:
        """[B, C] log-probs, in training mode (gradient checkpointing on)."""
        self._engine.train()
        return self._engine(rows)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss that is already normalised over the whole step, micro-batches and ranks."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # DeepSpeed counts backwards in step(); only the last one updates

    def step(self) -> float:
        """Clip, update, and return the gradient norm before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def model(self) -> PreTrainedModel:
        """The bare causal LM: what samples and what is saved."""
        return self.policy.model

    @property
    def learning_rate(self) -> float:
        """What the last step used."""
        return self._engine.get_lr()[0]

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()
