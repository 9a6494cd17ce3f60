"""Run by test_engine.py in processes of their own: a step with every objective, each from the same weights.

usage: engine_losses.py MODEL_FOLDER OUT_FILE PACK_TOKENS
"""

import json
import sys
from pathlib import Path
from typing import get_args

import torch

from grpo_ds.core.objective import LossType, Objective
from grpo_ds.memory.phases import Profiler
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy
from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.training.engine import Engine
from grpo_ds.training.update import update
from tests.training.engine_steps import DS, GROUP, QUESTIONS, WIDTH, fixed_rollout

TRUNCATED = (0, 4, 5, 10)  # rows that are not counted: three on the first of two ranks, one on the second

OBJECTIVES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in get_args(LossType)},
    "entropy_coef": {"entropy_coef": 0.5},
    "top_entropy_quantile": {"top_entropy_quantile": 0.3},
    "both without a KL": {"entropy_coef": 0.5, "top_entropy_quantile": 0.3, "beta": 0.0},
}


def objective_of(settings: dict) -> Objective:
    common = {"beta": 0.1, "kl_estimator": "k3_corrected", "delta": 1.5, "max_completion_length": WIDTH}
    return Objective(**{**common, **settings})


def main(folder: str, out: str, pack_tokens: int) -> None:
    here = ranks.start()
    share = QUESTIONS // here.size
    json_file = Path(out).with_suffix(f".ds{here.rank}.json")
    json_file.write_text(json.dumps(DS), encoding="utf-8")
    ds = resolve_ds_config(json_file, fill=DsSizes(1e-3, 0.0, 0.0, 0, 1, share * GROUP, here.size))
    rollout = fixed_rollout(slice(here.rank * share, (here.rank + 1) * share), truncated=TRUNCATED)
    done = {}
    for name, settings in OBJECTIVES.items():
        model = load_policy(folder, dtype=torch.float32, checkpointing=True)
        engine = Engine(LogprobModel(model, vocab_size=259, temperature=1.0, chunk_mib=1), ds)
        objective = objective_of(settings)
        # Made-up old log-probs give ratios other than 1 in the first step, before moments are rounded.
        options = {"pack_tokens": pack_tokens, "world": here, "objective": objective}
        tally = update(engine, rollout, Profiler(here.device), old_logprobs=rollout.ref_logprobs, **options).tally
        metrics = tally.means(here.sum(tally.as_tensor()))
        done[name] = {"weights": {k: v.clone() for k, v in model.state_dict().items()}, "metrics": metrics}
        engine.close()
    if here.is_first:
        torch.save(done, out)
    here.wait()
    ranks.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
