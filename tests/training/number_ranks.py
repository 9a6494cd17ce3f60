"""Run by test_nonfinite.py, one process a rank: a bad number on one rank skips or ends the step on every rank.

usage: number_ranks.py MODEL_FOLDER OUT_FOLDER LAYOUT
"""

import json
import sys
from pathlib import Path

import torch

from grpo_ds.core.objective import Objective
from grpo_ds.errors import NumbersError, PreflightError
from grpo_ds.system import ranks
from grpo_ds.training.nonfinite import NonfiniteSteps
from grpo_ds.training.preflight import preflight
from grpo_ds.training.sampling import Sampler
from tests.conftest import make_tokenizer
from tests.training.engine_steps import QUESTIONS
from tests.training.layouts import assert_untouched, everything, make_engine, rollout_of, take_step

BAD_RANK = 1


def checked(engine, here, *, pack_tokens=0):
    """Return the error of preflight, "" if it passes."""
    sampler = Sampler(engine.model, make_tokenizer(), max_completion_length=5)
    try:
        preflight(engine, sampler, here, objective=Objective(max_completion_length=5), pack_tokens=pack_tokens)
    except PreflightError as error:
        return str(error)
    return ""


def main(model: str, folder: Path, layout: str) -> None:
    here, said = ranks.start(), {}
    engine = make_engine(model, folder, layout, rank=here.rank, ranks=here.size)
    before, is_bad = everything(engine), here.rank == BAD_RANK
    said["preflight"] = [checked(engine, here, pack_tokens=tokens) for tokens in (0, 35)]
    backward = engine.backward
    if is_bad:
        engine.backward = lambda loss, *, last=True: backward(loss * 3, last=last)
    said["gradients"] = checked(engine, here)
    engine.backward = backward
    if is_bad:
        engine.model.generation_config.update(top_k=20)
    said["generation config"] = checked(engine, here)
    assert_untouched(before, engine)

    share = QUESTIONS // here.size
    rollout = rollout_of(slice(here.rank * share, (here.rank + 1) * share))
    kept = rollout.ref_logprobs.clone()
    lines: list[str] = []
    steps = NonfiniteSteps(1, here, lines.append)
    steps.folder = folder
    if is_bad:
        rollout.ref_logprobs[2, 0] = torch.nan
    try:
        for step in range(3):
            # The ranks have different numbers of backwards, and the bad rank takes part in all of them.
            done = take_step(engine, rollout, pack_tokens=0 if is_bad else 35, here=here)
            assert_untouched(before, engine)
            steps.record_step(done.bad, step, rollout, policy=done.logprobs)
    except NumbersError as error:
        said["stopped"] = str(error)
    said["bad"], said["lines"] = done.bad, lines
    rollout.ref_logprobs.copy_(kept)
    done = take_step(engine, rollout, pack_tokens=35, here=here)
    said["after"] = [done.bad, done.tally.means(here.sum(done.tally.as_tensor()))["grad_norm"]]
    (folder / f"rank{here.rank}.json").write_text(json.dumps(said), encoding="utf-8")
    engine.close()
    here.wait()
    ranks.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
