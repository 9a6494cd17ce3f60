"""Run by test_engine.py in processes of their own: optimizer steps on fixed completions, under real DeepSpeed.

usage: engine_steps.py MODEL_FOLDER OUT_FILE STEPS PACK_TOKENS MU REHEARSE FLAT LORA_R EXPECTED
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo_ds.core.advantages import group_advantages
from grpo_ds.core.expected_reward import LabelAdvantages, LabelProbs, expected_advantages
from grpo_ds.core.objective import Objective
from grpo_ds.core.pick import NOWHERE
from grpo_ds.core.tally import Tally
from grpo_ds.memory.phases import Profiler
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.lora import add_adapter
from grpo_ds.models.policy import load_policy
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.scoring import Rewards
from grpo_ds.training.engine import Engine
from grpo_ds.training.rollout import Rollout
from grpo_ds.training.sampling import Completions
from grpo_ds.training.update import update

QUESTIONS, GROUP, WIDTH = 4, 3, 10
OBJECTIVE = Objective(beta=0.1, max_completion_length=WIDTH)
DS = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": False},
    # eps 1: the update is nearly linear in the gradient, so its rounding is not amplified to a sign
    "optimizer": {"type": "AdamW8bit", "params": {"lr": 0.05, "eps": 1.0, "weight_decay": 0.1}},
}


def fixed_rollout(
    questions: slice, *, flat: int = 0, truncated: tuple[int, ...] = (), expected: bool = False
) -> Rollout:
    """The same four groups in every process; a rank takes its share. The first `flat` groups have equal rewards, and
    `truncated` rows are not counted. With `expected`, two labels have probabilities in most completions."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 250, (n,), generator=g) for n in (29, 24, 13, 6)]
    lengths = torch.randint(1, WIDTH + 1, (QUESTIONS * GROUP, 1), generator=g)
    ids = torch.randint(0, 250, (QUESTIONS * GROUP, WIDTH), generator=g)
    rewards = torch.rand(QUESTIONS * GROUP, generator=g)
    rewards[: flat * GROUP] = 0.5
    ref_logprobs = -5 - torch.rand(QUESTIONS * GROUP, WIDTH, generator=g)
    rows = slice(questions.start * GROUP, questions.stop * GROUP)
    mask = (torch.arange(WIDTH) < lengths)[rows]
    ended = ~torch.isin(torch.arange(QUESTIONS * GROUP), torch.tensor(truncated, dtype=torch.long))[rows]
    advantages, labels, of_labels = group_advantages(rewards, group_size=GROUP), None, None
    if expected:
        labels = fixed_labels(lengths.squeeze(1))
        options = {"reward": 0.5, "group_size": GROUP, "scale": "group"}
        advantages, of_labels = expected_advantages(rewards, 0.5 * labels.p_right, labels, **options)
        labels = LabelProbs(labels.places[rows], labels.ids, labels.probs[rows], labels.right[rows])
        of_labels = LabelAdvantages(of_labels.labels[rows], of_labels.drawn[rows])
    return Rollout(
        questions=[None] * (questions.stop - questions.start),
        prompts=prompts[questions],
        completions=Completions(ids[rows], mask, ended),
        texts=[""] * len(mask),
        rewards=Rewards(rewards[rows].tolist(), {}),
        labels=labels,
        advantages=advantages[rows],
        counted=mask & ended[:, None],
        ref_logprobs=ref_logprobs[rows],
        of_labels=of_labels,
    )


def fixed_labels(lengths: torch.Tensor) -> LabelProbs:
    """Two labels in the middle of every completion but each fourth one."""
    places = torch.where(torch.arange(len(lengths)) % 4 == 3, NOWHERE, lengths // 2)
    yes = torch.linspace(0.1, 0.9, len(lengths))
    probs = torch.stack([yes, 1 - yes], dim=1) * (places != NOWHERE)[:, None]
    return LabelProbs(places, torch.tensor([3, 7]), probs, torch.arange(len(lengths)) % 2)


def main(
    folder: str, out: str, steps: int, pack_tokens: int, mu: int, rehearse: int, flat: int, lora_r: int, expected: int
) -> None:
    here = ranks.start()
    share = QUESTIONS // here.size
    json_file = Path(out).with_suffix(f".ds{here.rank}.json")
    json_file.write_text(json.dumps(DS), encoding="utf-8")
    sizes = DsSizes(1e-3, 0.0, 0.0, 0, steps, share * GROUP, here.size)
    model = load_policy(folder, dtype=torch.float32, checkpointing=True)
    if lora_r:
        add_adapter(model, r=lora_r, alpha=8, targets=["all-linear"], base=folder, seed=here.rank)
    policy = LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1)
    engine = Engine(policy, resolve_ds_config(json_file, fill=sizes))
    mine = slice(here.rank * share, (here.rank + 1) * share)
    rollout = fixed_rollout(mine, flat=flat % QUESTIONS, expected=bool(expected))
    objective = replace(OBJECTIVE, beta=0.0) if flat % QUESTIONS else OBJECTIVE
    history, profiler = [], Profiler(here.device)
    if rehearse:
        engine.rehearse(rows for rows, _ in rollout.micro_batches(pack_tokens))
    for _ in range(steps):
        tally, old = Tally(), None
        for _ in range(mu):
            options = {"old_logprobs": old, "pack_tokens": pack_tokens, "world": here}
            done = update(engine, rollout, profiler, **options, objective=objective)
            tally.merge(done.tally)
            old = done.logprobs if old is None else old
        history.append(tally.means(here.sum(tally.as_tensor())))
    if flat == QUESTIONS:  # a last update that has nothing to compute
        options = {"old_logprobs": None, "pack_tokens": pack_tokens, "world": here}
        update(engine, fixed_rollout(mine, flat=flat), profiler, **options, objective=replace(OBJECTIVE, beta=0.0))
    if here.is_first:
        torch.save({"weights": model.state_dict(), "history": history}, out)
    here.wait()
    ranks.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
