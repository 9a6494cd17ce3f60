"""The memory plan against the machine: a real trainer, a model with random weights, the peak of each phase.

Memory is what the trainer's profiler says (memory/phases.py): resident, and on a card allocated. Without a card all
is in RAM, and so is the plan. The C allocator is told to give freed blocks back (MALLOC_MMAP_THRESHOLD_), as it does
with large ones anyway. Prompts are cut to a few tokens: the bytes a parameter are what is checked.

    python benchmarks/plan_check.py [--model qwen2.5-0.5b] [--ds ds_configs/zero2.json] [--layers N]
        [--prompt 48] [--completion 8] [--generations 2] [--questions 2] [--micro_groups 0] [--reference int8]
        [--json FILE]
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
GIB = 2**30


def main() -> None:
    arguments = parse_arguments()
    if any(os.environ.get(name) != value for name, value in STEADY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY})
    from grpo_ds.config import TrainConfig
    from grpo_ds.ds_config import DsSizes, resolve_ds_config
    from grpo_ds.machine import cpu_has_bf16, gpu_memory_gib
    from grpo_ds.memory.plan import make_plan
    from grpo_ds.memory.shape import shape_of

    with tempfile.TemporaryDirectory() as folder:
        random_model(arguments, Path(folder))
        config = TrainConfig(
            model=folder,
            batch_size=arguments.questions,
            num_generations=arguments.generations,
            max_prompt_length=arguments.prompt,
            max_completion_length=arguments.completion,
            micro_groups=arguments.micro_groups,
            eval_batch_size=1,
            reference=arguments.reference,
        )
        completions = arguments.questions * arguments.generations
        native = gpu_memory_gib() is not None or cpu_has_bf16()
        sizes = DsSizes(1e-6, 0.0, 1.0, 0, 2, completions, 1, bf16=native)
        ds = resolve_ds_config(arguments.ds, fill=sizes)
        device: Any = "cuda" if gpu_memory_gib() else "cpu"
        plan = make_plan(replace(shape_of(folder), name=arguments.model), config, ds, device=device)
        measured = train(config, ds)
    rows = [
        {
            "phase": phase.name,
            "where": where,
            "predicted": phase.bytes_on(where),
            "measured": measured[phase.name].peak(where),
        }
        for where in (("gpu", "host") if device == "cuda" else ("host",))
        for phase in plan.phases
        if phase.name in measured
    ]
    print(
        f"{arguments.model}, {arguments.ds}, reference {arguments.reference}, {config.max_prompt_length} prompt tokens"
    )
    print(f"{'phase':16}{'predicted':>10}{'measured':>10}{'off':>8}   GiB")
    for row in rows:
        off = row["predicted"] / row["measured"] - 1 if row["measured"] else 0.0
        sizes = "".join(f"{row[name] / GIB:10.2f}" for name in ("predicted", "measured"))
        print(f"{row['phase']:11}{row['where']:5}{sizes}{off:+8.1%}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a preset of grpo_ds/memory/shape.py")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--ds", default="ds_configs/zero2.json")
    parser.add_argument("--reference", default="int8")
    for name, default in {"prompt": 48, "completion": 8, "generations": 2, "questions": 2, "micro_groups": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json")
    return parser.parse_args()


def random_model(arguments: argparse.Namespace, folder: Path) -> None:
    """A bf16 checkpoint of the preset's shape with random weights and the embedded model's tokenizer.

    Made in a process of its own, whose memory goes when it ends.
    """
    if os.fork():
        _, status = os.wait()
        if status:
            sys.exit("the model could not be made")
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from grpo_ds.memory.shape import PRESET_CONFIGS
    from grpo_ds.models.embedded import embedded_folder

    shape = dict(PRESET_CONFIGS[arguments.model])
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
    os._exit(0)


def train(config: Any, ds: Any) -> dict[str, Any]:
    """Two steps and a save of a real trainer; what its profiler saw of each phase."""
    from grpo_ds import world
    from grpo_ds.report.console import Console
    from grpo_ds.rollouts import PromptStyle
    from grpo_ds.task.questions import read_questions
    from grpo_ds.task.rewards import reward_functions
    from grpo_ds.trainer import Trainer

    class ShortStyle(PromptStyle):
        def encode(self, tokenizer: Any, questions: Any) -> list[list[int]]:
            return [prompt[: config.max_prompt_length] for prompt in super().encode(tokenizer, questions)]

    here = world.start()
    rewards = reward_functions(labels=config.label_names, correctness_reward=2.0, format_reward=0.2)
    questions = read_questions("sample", labels=config.label_names).questions
    trainer = Trainer(config, ds, here, Console(), rewards)
    trainer.style = ShortStyle(config.label_names, 0, False, max_prompt_length=4096)
    trainer.make_reference(questions)
    for step in range(2):
        trainer.step(step, questions)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder))
    return trainer.profiler.uses()


if __name__ == "__main__":
    main()
