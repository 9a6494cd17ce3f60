"""Engines on the tiny model in every layout in which DeepSpeed can keep gradients and masters."""

import copy
import json
from dataclasses import replace

import torch

from grpo_ds.memory.phases import Profiler
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system.ranks import start
from grpo_ds.task.questions import Question
from grpo_ds.training.engine import Engine
from grpo_ds.training.precision import DTYPES
from grpo_ds.training.update import update
from tests.training.engine_steps import OBJECTIVE, QUESTIONS, fixed_rollout

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = {  # name -> (zero_optimization, bf16, settings of AdamW8bit)
    "offload": ({"stage": 2, **OFFLOAD}, {"enabled": False}, {}),
    "offload, own staging": ({"stage": 2, **OFFLOAD}, {"enabled": True}, {"share_staging": False}),
    "offload, bf16": ({"stage": 2, **OFFLOAD}, {"enabled": True}, {}),
    "offload, bf16 masters": ({"stage": 2, **OFFLOAD}, {"enabled": True, "bf16_master_weights_and_grads": True}, {}),
    "stage 1, offload": ({"stage": 1, **OFFLOAD}, {"enabled": False}, {}),
    "on the card": ({"stage": 2}, {"enabled": False}, {}),
    "on the card, bf16": ({"stage": 2}, {"enabled": True}, {}),
    "stage 1, bf16": ({"stage": 1}, {"enabled": True}, {}),
    "stage 0": ({"stage": 0}, {"enabled": False}, {}),
    "stage 0, bf16": ({"stage": 0}, {"enabled": True}, {}),
}
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear", "warmup_min_lr": 5e-4}}


def make_engine(model, folder, layout, *, rank=0, ranks=1, fp16=None, clipping="auto", flags=None):
    """An engine on the model saved in `model`, with a schedule, which shows whether a step was counted.

    fp16: settings of the loss scale; None: the precision is the layout's. flags: sizes that replace the schedule.
    """
    start()
    zero, bf16, params = copy.deepcopy(LAYOUTS[layout])
    optimizer = {"type": "AdamW8bit", "params": {"lr": 1e-3, **params}}
    ds = {"zero_optimization": zero, "bf16": bf16, "optimizer": optimizer, "scheduler": SCHEDULE}
    ds |= {"gradient_clipping": clipping}
    if flags is not None:
        del ds["scheduler"]
    if fp16 is not None:
        ds |= {"fp16": {"enabled": True, **fp16}, "bf16": {}}
    file = folder / f"ds{rank}.json"
    file.write_text(json.dumps(ds), encoding="utf-8")
    resolved = resolve_ds_config(file, fill=replace(DsSizes(1e-3, 0.0, 1.0, 0, 5, 12 // ranks, ranks), **(flags or {})))
    policy = load_policy(str(model), dtype=DTYPES[resolved.precision], checkpointing=True)
    return Engine(LogprobModel(policy, vocab_size=259, temperature=1.0, chunk_mib=1), resolved)


def rollout_of(share=slice(0, QUESTIONS)):
    """The fixed rollout, with named questions and texts."""
    rollout = fixed_rollout(share)
    rollout.questions[:] = [Question(f"q{n}", "", "", "yes") for n in range(share.start, share.stop)]
    rollout.texts[:] = [f"text {b}" for b in range(len(rollout.texts))]
    return rollout


def take_step(engine, rollout, *, pack_tokens=0, here=None, old_logprobs=None):
    here = here or start()
    options = {"old_logprobs": old_logprobs, "pack_tokens": pack_tokens, "world": here, "objective": OBJECTIVE}
    return update(engine, rollout, Profiler(here.device), **options)


def everything(engine):
    """Everything that a step changes: weights, masters, moments, counters and schedule."""
    inner = engine._engine.optimizer
    basic = getattr(inner, "optimizer", inner)
    masters = [p for group in basic.param_groups for p in group["params"]]
    moments = [v for p in masters for _, v in sorted(basic.state[p].items())] if basic.state else []
    tensors = [*engine.policy.parameters(), *masters, *(v for v in moments if isinstance(v, torch.Tensor))]
    schedule = engine._engine.lr_scheduler.state_dict()
    counters = [engine._engine.global_steps, [v for v in moments if not isinstance(v, torch.Tensor)], schedule]
    return [tensor.detach().clone() for tensor in tensors], copy.deepcopy(counters)


def assert_untouched(before, engine):
    tensors, counters = everything(engine)
    assert counters == before[1]
    assert len(tensors) == len(before[0])
    assert all(torch.equal(one, two) for one, two in zip(before[0], tensors, strict=True))
