"""Learning with each way to keep Adam's moments and the masters: the same updates, one optimizer after another.

usage: python benchmarks/moments.py [--model smollm2-135m] [--loss supervised|grpo] [--updates 200] [--seeds 0,1,2]

The completions of some questions are drawn and scored once. Then each optimizer takes the same updates on them, one
question each, from the same weights: of the mean negative log-prob of the completions (supervised, which has less
noise), or of GRPO's clipped loss against the log-probs at the start. Masters and gradients are one flat tensor, as
under ZeRO. Compared with Adam in fp32: the losses, of these questions and of others, and the weights. Behind each
finished row its figures are appended to --out, and a run that is started again goes on behind them. All figures are
measured.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from answer_reward import draw_groups, rollout_of
from torch import Tensor

from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.optim import CPUAdamW8bit
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system import ranks
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.training.label_tokens import label_ids_for
from grpo_ds.training.prompt_style import prompt_style
from grpo_ds.training.rollout import Rollout
from grpo_ds.training.sampling import Sampler
from grpo_ds.training.update import part_loss, step_weights

SHORT = 96  # tokens of the prompt that is trained on; the completions are drawn behind the recipe's, of 512
EXACT = "Adam, fp32"


@dataclass(frozen=True, slots=True)
class Case:
    """A question's completions, with their log-probs at the start [B, C]."""

    rollout: Rollout
    old: Tensor


@dataclass(frozen=True, slots=True)
class Way:
    """An optimizer over one flat tensor. rate: times --learning_rate."""

    build: Callable[..., torch.optim.Optimizer]
    masters: torch.dtype = torch.float32
    rate: float = 1.0


def eight_bit(**settings: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda weights, **common: CPUAdamW8bit(weights, **settings, **common)


BF16 = torch.bfloat16
WAYS = {
    EXACT: Way(lambda weights, **common: torch.optim.AdamW(weights, fused=True, **common)),
    "bitsandbytes' codes": Way(eight_bit()),
    "companded codes": Way(eight_bit(moments="companded")),
    "bitsandbytes', residual of 16 bits": Way(eight_bit(rounding="residual"), BF16),
    "bitsandbytes', residual of 8 bits": Way(eight_bit(rounding="residual8"), BF16),
    "companded, residual of 8 bits": Way(eight_bit(moments="companded", rounding="residual8"), BF16),
    "bitsandbytes', stochastic rounding": Way(eight_bit(rounding="stochastic"), BF16),
    **{f"SGD, rate x {x:g}": Way(torch.optim.SGD, rate=x) for x in (1e2, 1e3, 1e4)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--loss", choices=("supervised", "grpo"), default="supervised")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--questions", type=int, default=40, help="trained on, in turn; a quarter as many are held out")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--only", default="", help="ways in whose name this regular expression is found, beside Adam in fp32"
    )
    parser.add_argument("--out", type=Path, default=Path("moments.jsonl"))
    typed = parser.parse_args()
    world, rows = ranks.start(), {}
    for line in typed.out.read_text().splitlines() if typed.out.is_file() else ():
        row = json.loads(line)
        rows[row["loss"], row["seed"], row["way"]] = row
    for seed in map(int, typed.seeds.split(",")):
        wanted = [way for way in WAYS if way == EXACT or re.search(typed.only, way)]
        if all((typed.loss, seed, way) in rows for way in wanted):
            continue
        trained, held_out = draw(typed, seed, world)
        exact = None
        for way in wanted:
            if (typed.loss, seed, way) in rows and way != EXACT:
                continue
            found, end = train(typed, WAYS[way], trained, held_out, world)
            exact = end if way == EXACT else exact
            assert exact is not None
            found |= {"loss": typed.loss, "seed": seed, "way": way, "from_exact": float((end - exact).norm())}
            if (typed.loss, seed, way) not in rows:
                rows[typed.loss, seed, way] = found
                with typed.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            print(seed, way, {name: it for name, it in found.items() if name != "losses"}, flush=True)
    report([row for (loss, _, _), row in rows.items() if loss == typed.loss])


def draw(typed: argparse.Namespace, seed: int, world: ranks.World) -> tuple[list[Case], list[Case]]:
    """Draw and score the completions of the questions to train on, and of others."""
    config = TrainConfig(
        model=typed.model, data=typed.data, few_shot=2, prefill=True, max_prompt_length=512, max_completion_length=48,
        num_generations=4, beta=0.0,
    )  # fmt: skip
    tokenizer, style = load_tokenizer(config.model), prompt_style(config)
    short = prompt_style(replace(config, few_shot=0, max_prompt_length=SHORT))
    model = load_policy(config.model, dtype=BF16, checkpointing=False)
    policy = LogprobModel(model, vocab_size=len(tokenizer), temperature=1.0, chunk_mib=64)
    sampler = Sampler(
        model, tokenizer, max_completion_length=config.max_completion_length, stop=config.answer_format.stop,
        label_ids=label_ids_for(config, tokenizer, print),
    )  # fmt: skip
    questions, _ = split_questions(read_questions(config.data).questions, eval_fraction=0.2, seed=seed)
    cases = []
    for number, question in enumerate(questions[: typed.questions + typed.questions // 4]):
        groups = draw_groups(config, sampler, style, [question], 1000 * seed + number)
        prompts = [torch.tensor(ids) for ids in short.encode(tokenizer, [question])]
        rollout = rollout_of(replace(groups, prompts=prompts), "sampled", config, world)
        with torch.no_grad():
            cases.append(Case(rollout, own_logprobs(policy, rollout)))
    return cases[: typed.questions], cases[typed.questions :]


def train(
    typed: argparse.Namespace, way: Way, trained: list[Case], held_out: list[Case], world: ranks.World
) -> tuple[dict[str, Any], Tensor]:
    """Take the updates; return the figures, and the weights as they are computed with."""
    model = load_policy(typed.model, dtype=BF16, checkpointing=False)
    policy = LogprobModel(model, vocab_size=len(load_tokenizer(typed.model)), temperature=1.0, chunk_mib=64)
    parameters = [it for it in model.parameters() if it.requires_grad]
    weights = torch.cat([it.data.flatten() for it in parameters])
    gradient, place = torch.zeros_like(weights), 0
    for it in parameters:
        it.data = weights[place : place + it.numel()].view_as(it)
        it.grad = gradient[place : place + it.numel()].view_as(it)
        place += it.numel()
    start = weights.clone()
    masters = torch.nn.Parameter(weights if way.masters == BF16 else weights.to(way.masters))
    masters.grad = gradient if masters.dtype == gradient.dtype else torch.zeros_like(masters)
    optimizer = way.build([masters], lr=typed.learning_rate * way.rate, weight_decay=0.0)
    before, losses = figures(policy, trained, held_out, world), []
    for update in range(typed.updates):
        loss = loss_of(policy, trained[update % len(trained)], typed.loss, world)
        gradient.zero_()
        if loss.requires_grad:
            loss.backward()
        if masters.grad is not gradient:
            masters.grad.copy_(gradient)
        masters.grad *= min(1.0, 1 / (float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) + 1e-6))
        optimizer.step()
        if masters.data_ptr() != weights.data_ptr():
            weights.copy_(masters.data)
        losses.append(float(loss.detach()))
    moved, after = (weights.float() - start.float()).norm(), figures(policy, trained, held_out, world)
    return {
        "losses": losses,
        "moved": float(moved),
        "changed": float((weights != start).double().mean()),
        **{name: [value, after[name]] for name, value in before.items()},
    }, weights.float()


def own_logprobs(policy: LogprobModel, rollout: Rollout) -> Tensor:
    """Log-probs of a question's completions [B, C]."""
    ((rows, _),) = rollout.micro_batches(0)
    return policy(rows)[:, : rollout.counted.shape[1]]


def loss_of(policy: LogprobModel, case: Case, kind: str, world: ranks.World) -> Tensor:
    """Loss of a question's completions: their mean negative log-prob, or GRPO's."""
    own, counted = own_logprobs(policy, case.rollout), case.rollout.counted
    if kind == "supervised":
        return -(own * counted).sum() / counted.sum()
    ((_, part),) = case.rollout.micro_batches(0)
    objective = TrainConfig(beta=0.0, max_completion_length=48).objective
    weights = step_weights(counted, [part], world, objective)
    return part_loss(own, case.old, case.rollout, part, weights, counted, objective).loss


@torch.no_grad()
def figures(policy: LogprobModel, trained: list[Case], held_out: list[Case], world: ranks.World) -> dict[str, float]:
    """The losses of the questions trained on and of others; "held_out" is the supervised one."""
    mean = lambda cases, kind: statistics.mean(float(loss_of(policy, it, kind, world)) for it in cases)  # noqa: E731
    return {
        "held_out": mean(held_out, "supervised"),
        "grpo": mean(trained, "grpo"),
        "grpo_held_out": mean(held_out, "grpo"),
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print medians over the seeds, in a table of Markdown."""
    exact = {row["seed"]: row for row in rows if row["way"] == EXACT}

    def off_curve(row: dict[str, Any]) -> float:
        return statistics.mean(abs(a - b) for a, b in zip(row["losses"], exact[row["seed"]]["losses"], strict=True))

    by_loss: dict[str, dict[str, Callable[[dict[str, Any]], float]]] = {
        "supervised": {
            "loss of the last 20 updates": lambda row: statistics.mean(row["losses"][-20:]),
            "off fp32's curve": off_curve,
            "held-out loss": lambda row: row["held_out"][1] - row["held_out"][0],
        },
        "grpo": {
            "GRPO's loss": lambda row: row["grpo"][1] - row["grpo"][0],
            "held out": lambda row: row["grpo_held_out"][1] - row["grpo_held_out"][0],
            "held-out log-loss": lambda row: row["held_out"][1] - row["held_out"][0],
        },
    }
    columns = {
        **by_loss[rows[0]["loss"]],
        "weights changed": lambda row: row["changed"],
        "off fp32's end": lambda row: row["from_exact"] / exact[row["seed"]]["moved"],
    }
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for way in WAYS:
        if of_way := [row for row in rows if row["way"] == way]:
            cells = (statistics.median(map(column, of_way)) for column in columns.values())
            print(f"| {way} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
