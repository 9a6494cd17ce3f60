"""Noise of the gradient with a drawn and with an expected answer: the same questions, completions and weights.

usage: python benchmarks/answer_reward.py [--model smollm2-135m] [--data sample] [--questions 8] [--redraws 64]
    [--layers N]

The completions of the same questions are drawn again and again, without a step. Each draw gives two gradients, of
--answer_reward sampled and expected, from one forward pass. Printed: total variance of each over the draws, its
ratio, the share of groups without a gradient, and the share of the squared mean gradient that is not noise.
All figures are measured; the draws depend on the seed alone. --layers takes the gradient of the last layers only.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system import ranks
from grpo_ds.system.hardware import native_precision
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.task.rewards import CORRECTNESS, ready_made
from grpo_ds.task.scoring import score
from grpo_ds.training.collect import with_expected_answers
from grpo_ds.training.label_tokens import label_ids_for, label_probs
from grpo_ds.training.precision import DTYPES
from grpo_ds.training.prompt_style import prompt_style
from grpo_ds.training.rollout import Groups, make_rollout
from grpo_ds.training.sampling import Sampler
from grpo_ds.training.update import part_loss, step_weights

KINDS = ("sampled", "expected")
TOKENS = 900  # of a forward pass: a group, whose graph serves both gradients


class Noise:
    """Sums of gradients and of their squares over the draws; their total variance."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.sums = [torch.zeros(it.shape) for it in parameters]
        self.squares, self.count, self.flat, self.groups = 0.0, 0, 0, 0

    def add(self, gradient: list[torch.Tensor], groups: int, flat: int) -> None:
        for total, part in zip(self.sums, gradient, strict=True):
            total += part
        self.squares += sum(float(part.square().sum()) for part in gradient)
        self.count, self.groups, self.flat = self.count + 1, self.groups + groups, self.flat + flat

    def row(self) -> dict[str, float]:
        mean = sum(float((total / self.count).square().sum()) for total in self.sums)
        variance = (self.squares / self.count - mean) * self.count / (self.count - 1)
        return {
            "variance": variance,
            "mean_squared": mean,
            "signal": max(0.0, 1 - variance / self.count / mean),
            "groups_without_gradient": self.flat / self.groups,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--redraws", type=int, default=64)
    parser.add_argument("--layers", type=int, default=0, help="the last ones, whose gradient is taken; 0: all weights")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    typed = parser.parse_args()
    config = TrainConfig(
        model=typed.model, data=typed.data, few_shot=2, prefill=True, max_prompt_length=512, max_completion_length=48,
        num_generations=typed.num_generations, beta=0.0,
    )  # fmt: skip
    train, _ = split_questions(read_questions(config.data).questions, eval_fraction=0.2, seed=0)
    noise = measure(config, train[: typed.questions], typed.redraws, typed.layers)
    rows = {kind: noise[kind].row() for kind in KINDS}
    rows["ratio"] = {name: rows["expected"][name] / rows["sampled"][name] for name in ("variance", "mean_squared")}
    for kind, row in rows.items():
        print(kind, " ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if typed.out:
        typed.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(config: TrainConfig, questions: list, redraws: int, layers: int = 0) -> dict[str, Noise]:
    """Draw the completions of these questions `redraws` times; return the noise of both gradients."""
    world, tokenizer, style = ranks.start(), load_tokenizer(config.model), prompt_style(config)
    model = load_policy(config.model, dtype=DTYPES[native_precision(on_gpu=False)], checkpointing=False)
    policy = LogprobModel(model, vocab_size=len(tokenizer), temperature=config.temperature, chunk_mib=64)
    sampler = Sampler(
        model, tokenizer, max_completion_length=config.max_completion_length, stop=config.answer_format.stop,
        label_ids=label_ids_for(config, tokenizer, print),
    )  # fmt: skip
    if layers:
        model.requires_grad_(False)
        model.model.layers[-layers:].requires_grad_(True)
    parameters = [it for it in model.parameters() if it.requires_grad]
    noise = {kind: Noise(parameters) for kind in KINDS}
    for draw in range(redraws):
        groups = draw_groups(config, sampler, style, questions, draw)
        gradients = {kind: [torch.zeros(it.shape) for it in parameters] for kind in KINDS}
        rollouts = {kind: rollout_of(groups, kind, config, world) for kind in KINDS}
        wide = rollouts["expected"]
        batches = wide.micro_batches(TOKENS)
        weights = step_weights(wide.counted, [part for _, part in batches], world, config.objective)
        for rows, part in batches:
            logprobs = policy(rows)
            for kind, rollout in rollouts.items():
                own = logprobs[:, : wide.counted.shape[1] + rollout.label_columns]
                loss = part_loss(
                    own, own.detach(), rollout, part, weights[part], rollout.counted[part], config.objective
                ).loss
                parts = torch.autograd.grad(loss, parameters, retain_graph=kind == KINDS[0], allow_unused=True)
                for total, gradient in zip(gradients[kind], parts, strict=True):
                    total += 0 if gradient is None else gradient
        for kind, rollout in rollouts.items():
            by_group = (rollout.all_advantages() == 0).all(dim=1).view(len(questions), -1).all(dim=1)
            noise[kind].add(gradients[kind], len(questions), int(by_group.sum()))
        print(f"draw {draw + 1} of {redraws}", flush=True)
    return noise


def draw_groups(config, sampler, style, questions, seed) -> Groups:  # type: ignore[no-untyped-def]
    """Sample and score the groups; rewards of drawn answers."""
    options = {"group_size": config.num_generations, "temperature": config.temperature, "seed": seed}
    ids = style.encode(sampler.tokenizer, questions)
    completions, prompts = sampler(ids, **options), [torch.tensor(prompt) for prompt in ids]
    repeated = [question for question in questions for _ in range(config.num_generations)]
    texts = style.texts(sampler.tokenizer, completions)
    functions = ready_made(answer_format=config.answer_format)
    rewards = score(texts, repeated, functions={name: (functions[name], 1.0) for name in (CORRECTNESS, "format")})
    right, format_ = [question.label for question in repeated], config.answer_format
    labels = label_probs(completions, texts, right, sampler.tokenizer, format_, sampler.label_ids)
    return Groups(questions, prompts, completions, texts, rewards, labels)


def rollout_of(groups: Groups, kind: str, config: TrainConfig, world: ranks.World):  # type: ignore[no-untyped-def]
    """Advantages of one kind of reward."""
    reward = config.correctness_reward if kind == "expected" else 0.0
    if reward:
        groups = replace(groups, rewards=with_expected_answers(groups.rewards, groups.labels, reward))
    options = {"scale_rewards": config.scale_rewards, "mask_truncated": False, "reference": None, "pack_tokens": 0}
    return make_rollout(groups, world, **options, expected_reward=reward)


if __name__ == "__main__":
    main()
