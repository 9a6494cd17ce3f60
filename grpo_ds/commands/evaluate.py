"""Grade a model's greedy answers to the held-out questions, or with --eval_fraction 1 to all questions."""

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
    parsed, gpu_gib = parse(EvaluateConfig, argv, about=__doc__), gpu_memory_gib()
    choice = choose_model(parsed.unchecked().model, gpu_gib=gpu_gib, ram_gib=ram_gib())
    config = parsed.config(choice.recipe, model=choice.model)
    found = read_questions(config.data, labels=config.label_names, fields=config.field_names)
    questions = list(found.questions)
    if config.eval_fraction < 1:
        _, questions = split_questions(questions, eval_fraction=config.eval_fraction, seed=config.seed)
    questions = questions[: config.eval_limit]

    from grpo_ds.report.console import Console  # heavy libraries are loaded from here on
    from grpo_ds.system.ranks import World
    from grpo_ds.training.evaluate import evaluate, load_for_asking

    console = Console()
    console.line(f"Model: {config.model} ({choice.why})\nData: {found.source}; {len(questions)} questions")
    sampler, style = load_for_asking(config, bf16=gpu_gib is not None or cpu_has_bf16())
    sampler.rows_at_once = config.generation_batch_size or ROWS_AT_ONCE
    alone = World(rank=0, size=1, device=sampler.model.device)
    with console.progress("Answering", len(questions)) as advance:
        result = evaluate(sampler, style, questions, alone, advance=advance)
    console.line(json.dumps(asdict(result.grades), indent=1))
