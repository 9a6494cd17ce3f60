"""Run by test_fp16.py in processes of their own: three updates in fp16, the second of which overflows on one rank.

usage: engine_fp16.py MODEL_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from grpo_ds.system import ranks
from tests.training.engine_steps import QUESTIONS
from tests.training.layouts import make_engine, rollout_of, take_step


def main(model: str, out: str) -> None:
    CPU_Accelerator.is_fp16_supported = lambda self: True  # see fp16_on_cpu in conftest.py
    here = ranks.start()
    share = QUESTIONS // here.size
    engine = make_engine(Path(model), Path(out), "offload", rank=here.rank, ranks=here.size, fp16={})
    rollout = rollout_of(slice(here.rank * share, (here.rank + 1) * share))
    result = {"overflows": [], "scales": [], "moved": []}
    for number in range(3):
        before = [p.detach().clone() for p in engine.policy.parameters()]
        spoiled = engine.model.model.norm.weight
        hook = spoiled.register_hook(lambda g: g + torch.inf) if number == 1 and here.rank == 1 else None
        done = take_step(engine, rollout, here=here)
        if hook:
            hook.remove()
        result["overflows"].append(done.overflow)
        result["scales"].append(done.tally.means()["loss_scale"])
        same = [torch.equal(p, q) for p, q in zip(engine.policy.parameters(), before, strict=True)]
        result["moved"].append(not all(same))
    result["weights"] = {name: p.detach().clone() for name, p in engine.policy.named_parameters()}
    torch.save(result, Path(out) / f"rank{here.rank}.pt")
    here.wait()
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
