"""Run by test_engine.py in processes of their own: every way to keep the masters, through real ZeRO-2 offload.

The loss is linear in the weights, so that the gradients are the same bf16 numbers whatever the weights are.

usage: engine_masters.py OUT_FOLDER STEPS
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from grpo_ds.optim import slices
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.training import engine as engine_module
from grpo_ds.training.engine import Engine

MODES = {  # name -> (section bf16, settings of AdamW8bit)
    "own staging": ({}, {"share_staging": False}),
    "shared staging": ({}, {}),
    "residual": ({"bf16_master_weights_and_grads": True}, {}),
    "weights once": ({}, {}),  # as on a card
    "residual8": ({"bf16_master_weights_and_grads": True}, {"rounding": "residual8"}),
    "companded": ({}, {"moments": "companded"}),
    "stochastic": ({"bf16_master_weights_and_grads": True}, {"rounding": "stochastic"}),
}


class Linear(torch.nn.Module):
    """sum_i <w_i, g_i(step)>; the first weight, where a shared staging buffer would lie, has no gradient."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        shapes = (700,), (300, 64), (5000,), (4,)  # no padding: ZeRO sets it back to 0 on loading
        self.weights = torch.nn.ParameterList(torch.randn(s, generator=g).mul(0.02).bfloat16() for s in shapes)

    def forward(self, step, **_):
        g = torch.Generator().manual_seed(step)
        return sum((w * torch.randn(w.shape, generator=g).bfloat16()).sum() for w in self.weights[1:])


def make_engine(mode: str, here: ranks.World, folder: Path) -> Engine:
    bf16, params = MODES[mode]
    ds = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True, **bf16},
        "optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-5, **params}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}},
    }
    file = folder / f"ds{here.rank}.json"
    file.write_text(json.dumps(ds), encoding="utf-8")
    engine_module.on_card = lambda: mode == "weights once"
    return Engine(Linear(), resolve_ds_config(file, fill=DsSizes(1e-5, 0.01, 0.0, 0, 1, 1, here.size)), seed=here.rank)


def train(engine: Engine, first: int, last: int, ranks: int) -> None:
    for step in range(first, last):
        engine.backward(engine(step) / ranks)
        engine.step()


def state(engine: Engine, here: ranks.World) -> dict[str, torch.Tensor]:
    """This rank's masters in fp32 and the weights the model computes with."""
    zero = engine._engine.optimizer
    (master,) = zero.single_partition_of_fp32_groups
    residual = zero.optimizer.state[master].get("residual")
    exact = slices.join(master.data, residual) if residual is not None else master.data.float()
    weights = torch.cat([w.detach().flatten() for w in engine.policy.weights])
    assert engine.learning_rate == pytest.approx(1e-5)  # the schedule has reached the optimizer in use
    assert zero.optimizer.param_groups[0]["lr"] == engine.learning_rate
    assert zero.param_buffer_of_bit16_for_cpu_offload_groups[0].shape == master.shape
    return {"masters": exact.clone(), "weights": weights.clone()}


def main(out: str, steps: int) -> None:
    here, folder, result = ranks.start(), Path(out), {}
    for mode in MODES:
        straight = make_engine(mode, here, folder)
        train(straight, 0, steps // 2, here.size)
        straight.save_checkpoint(folder / mode, "half")
        train(straight, steps // 2, steps, here.size)
        resumed = make_engine(mode, here, folder)
        resumed.load_checkpoint(folder / mode, "half")
        train(resumed, steps // 2, steps, here.size)
        result[mode] = {"straight": state(straight, here), "resumed": state(resumed, here)}
    torch.save(result, folder / f"rank{here.rank}.pt")
    here.wait()
    ranks.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
