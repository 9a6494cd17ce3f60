"""Run by test_engine.py in processes of their own: optimizer steps on fixed completions, under real DeepSpeed.

usage: engine_steps.py MODEL_FOLDER OUT_FILE STEPS MICRO_GROUPS MU REHEARSE LORA_R
"""

import json
import sys
from pathlib import Path

import torch

from grpo_ds import world
from grpo_ds.core.advantages import group_advantages
from grpo_ds.core.tally import Tally
from grpo_ds.ds_config import DsSizes, resolve_ds_config
from grpo_ds.engine import Engine
from grpo_ds.memory.phases import Profiler
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.lora import add_adapter
from grpo_ds.models.policy import load_policy
from grpo_ds.rollouts import Rollout
from grpo_ds.sampling import Completions
from grpo_ds.task.rewards import Rewards
from grpo_ds.update import update

QUESTIONS, GROUP, WIDTH = 4, 3, 10
DS = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": False},
    # eps 1: the update is nearly linear in the gradient, so that its rounding is not blown up to a sign
    "optimizer": {"type": "AdamW8bit", "params": {"lr": 0.05, "eps": 1.0}},
}


def fixed_rollout(questions: slice) -> Rollout:
    """The same four groups in every process, of which a rank takes its own."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 250, (n,), generator=g) for n in (9, 4, 13, 6)]
    lengths = torch.randint(1, WIDTH + 1, (QUESTIONS * GROUP, 1), generator=g)
    ids = torch.randint(0, 250, (QUESTIONS * GROUP, WIDTH), generator=g)
    rewards = torch.rand(QUESTIONS * GROUP, generator=g)
    ref_logprobs = -5 - torch.rand(QUESTIONS * GROUP, WIDTH, generator=g)
    rows = slice(questions.start * GROUP, questions.stop * GROUP)
    mask = (torch.arange(WIDTH) < lengths)[rows]
    return Rollout(
        questions=[None] * (questions.stop - questions.start),
        prompts=prompts[questions],
        completions=Completions(ids[rows], mask, torch.ones(len(mask), dtype=torch.bool)),
        texts=[""] * len(mask),
        rewards=Rewards(rewards[rows].tolist(), {}),
        advantages=group_advantages(rewards, group_size=GROUP)[rows],
        ref_logprobs=ref_logprobs[rows],
    )


def main(folder: str, out: str, steps: int, micro_groups: int, mu: int, rehearse: int, lora_r: int) -> None:
    here = world.start()
    share = QUESTIONS // here.size
    json_file = Path(out).with_suffix(f".ds{here.rank}.json")
    json_file.write_text(json.dumps(DS), encoding="utf-8")
    sizes = DsSizes(1e-3, 0.0, 0.0, 0, steps, share * GROUP, here.size)
    model = load_policy(folder, dtype=torch.float32, checkpointing=True)
    if lora_r:
        add_adapter(model, r=lora_r, alpha=8, targets=["all-linear"], base=folder, seed=here.rank)
    policy = LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)
    engine = Engine(policy, resolve_ds_config(json_file, fill=sizes))
    rollout = fixed_rollout(slice(here.rank * share, (here.rank + 1) * share))
    history, profiler = [], Profiler(here.device)
    if rehearse:
        engine.rehearse(rows for rows, _ in rollout.micro_batches(micro_groups))
    for _ in range(steps):
        tally, old = Tally(), None
        for _ in range(mu):
            options = {"old_logprobs": old, "micro_groups": micro_groups, "ranks": here.size}
            more, logprobs = update(engine, rollout, profiler, **options, epsilon=0.2, beta=0.1)
            tally.merge(more)
            old = logprobs if old is None else old
        history.append(tally.means(here.sum(tally.as_tensor())))
    if here.is_first:
        torch.save({"weights": model.state_dict(), "history": history}, out)
    here.wait()
    world.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
