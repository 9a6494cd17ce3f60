"""Run by test_engine.py in one process for each rank: ranks with different numbers of draws train as one.

usage: trainer_ranks.py MODEL_FOLDER OUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from grpo_ds.report.console import Console
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.questions import read_questions
from grpo_ds.training.rollout import make_rollout
from grpo_ds.training.run import Run
from grpo_ds.training.trainer import Trainer
from tests.training.engine_steps import DS


def main(model: str, folder: Path) -> None:
    here = ranks.start()
    config = TrainConfig(
        model=model, batch_size=2, num_generations=4, num_steps=2, max_completion_length=8, max_prompt_length=480,
        dynamic_sampling=3, scale_rewards="batch", loss_type="dapo", eval_limit=2,
    )  # fmt: skip
    json_file = folder / f"ds{here.rank}.json"
    json_file.write_text(json.dumps(DS), encoding="utf-8")
    ds = resolve_ds_config(json_file, fill=config.ds_sizes(native="fp32", world_size=here.size))

    def reward(completions: list[str], **_: object) -> list[float]:
        """Equal rewards on rank 0, so that it draws as often as allowed; unequal ones elsewhere."""
        return [float(here.rank and row) for row in range(len(completions))]

    trainer = Trainer(config, ds, here, Console(speaks=False), {"rows": (reward, 1.0)})
    questions = list(read_questions("sample").questions)
    run = Run(trainer, questions, [], folder)
    run.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.engine.model.parameters()])
    groups = trainer.collector.draw(0, questions, 0, range(config.batch_size))
    rollout = make_rollout(groups, here, scale_rewards="batch", mask_truncated=False, reference=None, pack_tokens=0)
    torch.save({"weights": weights, "advantages": rollout.advantages}, folder / f"rank{here.rank}.pt")
    run.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
