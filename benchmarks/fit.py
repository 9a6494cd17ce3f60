"""Check the memory plan: real trainers with random weights under memory caps, each phase's peak beside its plan.

A run rehearses the worst case (longest prompts and completions), takes two steps and saves. On a card torch may use
the cap minus CUDA's own memory; `benchmarks/card.py --stage 3` does RUNS_ON_A_CARD, each in a separate process. Without
a card the plan puts everything into RAM; RUNS_WITHOUT_A_CARD check it there, with 0.5B.

    python benchmarks/fit.py [--docs docs/memory.md]       without a card; the table goes between the file's fit markers
    python benchmarks/fit.py --model qwen2.5-0.5b [--ds JSON] [--cap_gib 12] [--prompt 48] [--completion 8]
        [--questions 2] [--generations 2] [--pack_tokens 0] [--reference int8] [--checkpointing false] [--lora_r 16]
        [--layers N] [--weights DIR]       one run
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from random_weights import random_model

GIB = 2**30
FULL = ("--prompt", "512", "--completion", "300")
SHORT = ("--prompt", "48", "--completion", "8")
OFF = ("--checkpointing", "false")
LOW_RAM = ("--ds", "ds_configs/zero2_lowram.json")


def card_run(model: str, cap_gib: int, groups: str, *flags: str) -> tuple[str, ...]:
    """Flags of a run. groups: "2x4" for 2 questions with 4 completions each."""
    questions, generations = groups.split("x")
    sizes = ("--questions", questions, "--generations", generations)
    return ("--model", f"qwen2.5-{model}", "--cap_gib", str(cap_gib), *sizes, *FULL, *flags)


# Name -> flags; by the plan each fits its cap and 32 GB of RAM. The most telling first: without checkpointing all
# activations are kept.
RUNS_ON_A_CARD = {
    "1.5B in 24 GB, no checkpointing": card_run("1.5b", 24, "2x4", *OFF),
    "3B in 16 GB": card_run("3b", 16, "4x8", *LOW_RAM),
    "1.5B in 12 GB": card_run("1.5b", 12, "4x8"),
    "3B in 24 GB, no checkpointing": card_run("3b", 24, "2x2", *OFF, *LOW_RAM),
    "3B in 12 GB, LoRA": card_run("3b", 12, "2x4", "--lora_r", "16"),
    "1.5B in 16 GB, no checkpointing": card_run("1.5b", 16, "2x2", *OFF),
    "3B in 24 GB, bf16 reference": card_run("3b", 24, "4x8", "--reference", "bf16", *LOW_RAM),
    "1.5B in 16 GB, bf16 reference": card_run("1.5b", 16, "4x8", "--reference", "bf16"),
    "0.5B in 12 GB, no checkpointing": card_run("0.5b", 12, "2x4", *OFF),
}
RUNS_WITHOUT_A_CARD = [("--model", "qwen2.5-0.5b", *SHORT), ("--model", "qwen2.5-0.5b", *SHORT, *OFF)]


def main() -> None:
    arguments = parse_arguments()
    if arguments.model:
        return print(json.dumps(one_run(arguments)))
    results = []
    for flags in RUNS_WITHOUT_A_CARD:
        done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
        last = (done.stdout.splitlines() or [""])[-1]
        results.append(json.loads(last) if done.returncode == 0 else {"flags": flags, "error": last or done.returncode})
        print(last, file=sys.stderr)
    table = f"{heading()}\n\n{as_table(results)}"
    print(table)
    if arguments.docs:
        write_between(Path(arguments.docs), "fit", table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", metavar="FILE", help="write the table between the markers of this file")
    parser.add_argument("--model", help="a preset; only this run")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--ds", default="ds_configs/zero2.json")
    parser.add_argument("--reference", default="int8")
    parser.add_argument("--checkpointing", choices=("true", "false"), default="true", help="gradient checkpointing")
    parser.add_argument("--lora_r", type=int, default=0, help="train an adapter of this rank")
    parser.add_argument("--weights", type=Path, help="folder that keeps the random weights for the next run")
    parser.add_argument("--cap_gib", type=float, help="memory of a smaller card")
    for name, default in {"prompt": 48, "completion": 8, "generations": 2, "questions": 2, "pack_tokens": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def one_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the peaks in bytes, planned and measured, by memory and phase."""
    from grpo_ds.memory.plan import CUDA_CONTEXT, MemoryKind, make_plan
    from grpo_ds.models.shapes import shape_of
    from grpo_ds.settings.config import TrainConfig
    from grpo_ds.settings.ds_config import resolve_ds_config
    from grpo_ds.system.allocator import use_expandable_segments
    from grpo_ds.system.hardware import gpu_memory_gib, native_precision

    with tempfile.TemporaryDirectory() as own:
        folder = str(random_model(arguments.model, arguments.weights or Path(own), layers=arguments.layers))
        config = TrainConfig(
            model=folder,
            batch_size=arguments.questions,
            num_generations=arguments.generations,
            max_prompt_length=arguments.prompt,
            max_completion_length=arguments.completion,
            pack_tokens=arguments.pack_tokens,
            gradient_checkpointing=arguments.checkpointing == "true",
            reference=arguments.reference,
            lora_r=arguments.lora_r,
        )
        card = gpu_memory_gib()
        native = native_precision(on_gpu=card is not None)
        sizes = config.ds_sizes(native=native)
        ds = resolve_ds_config(arguments.ds, fill=sizes)
        shape = replace(shape_of(folder), name=arguments.model)
        plan = make_plan(shape, config, ds, device="cuda" if card else "cpu")
        if card and arguments.cap_gib:
            import torch

            use_expandable_segments()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((arguments.cap_gib * GIB - CUDA_CONTEXT) / total)
        started = time.monotonic()
        uses = train(config, ds, plan)
    kinds: tuple[MemoryKind, ...] = ("gpu", "ram") if card else ("ram",)
    return {
        "model": arguments.model,
        "ds": arguments.ds,
        "reference": arguments.reference,
        "checkpointing": arguments.checkpointing == "true",
        "lora_r": arguments.lora_r,
        "cap_gib": arguments.cap_gib,
        "tokens": f"{arguments.questions} x {arguments.generations} x ({arguments.prompt} + {arguments.completion})",
        "seconds": time.monotonic() - started,
        "peaks": {
            kind: {p.name: (p.bytes_in(kind), uses[p.name].peak(kind)) for p in plan.phases if p.name in uses}
            for kind in kinds
        },
    }


def train(config: Any, ds: Any, plan: Any) -> dict[str, Any]:
    """Rehearse the worst case, train two steps and save; return the measured use of each phase."""
    from grpo_ds.report.console import Console
    from grpo_ds.system import ranks
    from grpo_ds.task.questions import read_questions
    from grpo_ds.task.rewards import ready_made
    from grpo_ds.training.prompt_style import PromptStyle
    from grpo_ds.training.rehearsal import rehearse
    from grpo_ds.training.run import Run
    from grpo_ds.training.trainer import Trainer

    class ShortStyle(PromptStyle):
        def encode(self, tokenizer: Any, questions: Any) -> list[list[int]]:
            return [prompt[: config.max_prompt_length] for prompt in super().encode(tokenizer, questions)]

    here = ranks.start()
    ours = ready_made(answer_format=config.answer_format)
    rewards = {name: (ours[name], 1.0) for name in ("correctness", "format")}
    questions = read_questions("sample", labels=config.label_names).questions
    style = ShortStyle(config.answer_format, 0, False, max_prompt_length=4096)
    trainer = Trainer(config, ds, here, Console(speaks=False), rewards, plan, exact_memory=True, style=style)
    trainer.make_reference(questions)
    rehearse(trainer)
    for step in range(2):
        trainer.step(step, questions)
    with tempfile.TemporaryDirectory() as folder:
        Run(trainer, [], [], Path(folder)).save_model()
    return trainer.profiler.uses()


def heading() -> str:
    import torch

    machine = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), torch {torch.__version__}"
    return f"`python benchmarks/fit.py` on {time.strftime('%Y-%m-%d')}: no card, {machine}."


def as_table(results: list[dict[str, Any]]) -> str:
    """Return Markdown: planned / measured GiB of each phase, and the relative plan error."""
    from grpo_ds.memory.plan import MEMORY_NAMES

    phases = ["load", "initialise", "sample", "reference", "update", "step", "save"]
    lines = ["Planned / measured GiB (plan error).", ""]
    lines += ["| run | checkpointing | cap | memory | " + " | ".join(phases) + " |", "|---" * (4 + len(phases)) + "|"]
    for result in results:
        if "error" in result:
            lines.append(f"| {' '.join(result['flags'])} | | | | failed: {result['error']} |")
            continue
        adapter = f", LoRA {result['lora_r']}" if result["lora_r"] else ""
        run = f"{result['model']}{adapter}, `{Path(result['ds']).name}`, {result['reference']}, {result['tokens']} | "
        run += f"{'on' if result['checkpointing'] else 'off'} | {result['cap_gib'] or ''}"
        for kind, peaks in result["peaks"].items():
            cells = [peak_cell(*peaks[phase]) if phase in peaks else "" for phase in phases]
            lines.append(f"| {run} | {MEMORY_NAMES[kind]} | " + " | ".join(cells) + " |")
            run = " | | "
    return "\n".join(lines)


def peak_cell(planned: int, measured: int) -> str:
    from grpo_ds.memory.plan import relative_plan_error

    error = relative_plan_error(measured, planned)
    return f"{planned / GIB:.2f} / {measured / GIB:.2f}" + ("" if error is None else f" ({error:+.0%})")


def write_between(file: Path, name: str, table: str) -> None:
    """Replace what stands between the markers `name` of a document."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = file.read_text(encoding="utf-8")
    (before, _), (_, after) = text.split(begin), text.split(end)
    file.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
