"""Grade a model's greedy answers: held-out questions by default, all of a file's with --eval_fraction 1."""

import json
from dataclasses import asdict

from grpo_ds.memory.choose import choose_model
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import EvaluateConfig
from grpo_ds.system.hardware import check_torch, cpu_has_bf16, gpu_memory_gib, ram_gib
from grpo_ds.task.questions import read_questions, split_questions

ROWS_AT_ONCE = 16


def main(argv: list[str]) -> None:
    check_torch()
    asked = parse(EvaluateConfig, argv, about=__doc__).config.model
    gpu_gib = gpu_memory_gib()
    choice = choose_model(asked, gpu_gib=gpu_gib, ram_gib=ram_gib())
    config = parse(EvaluateConfig, [*argv, "--model", choice.model], about=__doc__, recipe=choice.recipe).config
    found = read_questions(config.data, labels=config.label_names, fields=config.field_names)
    questions = list(found.questions)
    if config.eval_fraction < 1:
        _, questions = split_questions(questions, eval_fraction=config.eval_fraction, seed=config.seed)
    questions = questions[: config.eval_limit]

    from grpo_ds.report.console import Console  # from here on heavy libraries are loaded
    from grpo_ds.system.ranks import World
    from grpo_ds.training.evaluate import evaluate
    from grpo_ds.training.inference import load_for_asking

    console = Console()
    console.line(f"Model: {config.model} ({choice.why})\nData: {found.source}; {len(questions)} questions")
    sampler, style = load_for_asking(config, bf16=gpu_gib is not None or cpu_has_bf16())
    sampler.rows_at_once = config.generation_batch_size or ROWS_AT_ONCE
    alone = World(rank=0, size=1, device=sampler.model.device)
    with console.progress("Answering", len(questions)) as advance:
        result = evaluate(sampler, style, questions, alone, advance=advance)
    console.line(json.dumps(asdict(result.grades), indent=1))
