"""Check the memory plan: real trainers with random weights under memory caps, each phase's peak beside its plan.

A run rehearses the worst case (longest prompts and completions), takes two steps and saves. With a card, each run of
RUNS_ON_A_CARD has a separate process, in which torch may use the cap minus CUDA's own memory. Without a card, one run
of 0.5B in fp32 checks RAM, in which the plan then puts everything.

    python benchmarks/fit.py [--docs docs/memory.md]       all runs; the table goes between the file's fit markers
    python benchmarks/fit.py --model qwen2.5-0.5b [--ds JSON] [--cap_gib 12] [--prompt 48] [--completion 8]
        [--questions 2] [--generations 2] [--pack_tokens 0] [--reference int8] [--layers N]       one run
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

GIB = 2**30
FULL = ["--prompt", "512", "--completion", "300", "--generations", "4"]  # with 2 questions
SHORT = ["--prompt", "48", "--completion", "8", "--generations", "2"]
RUNS_ON_A_CARD = [
    ["--model", "qwen2.5-0.5b", "--cap_gib", "12", *FULL],
    ["--model", "qwen2.5-1.5b", "--cap_gib", "12", *FULL],
    ["--model", "qwen2.5-1.5b", "--cap_gib", "16", "--reference", "bf16", *FULL],
    ["--model", "qwen2.5-3b", "--cap_gib", "16", "--ds", "ds_configs/zero2_lowram.json", *FULL],
    ["--model", "qwen2.5-3b", "--cap_gib", "24", *FULL],
]
RUNS_WITHOUT_A_CARD = [["--model", "qwen2.5-0.5b", *SHORT]]
MARKERS = "<!-- fit: begin -->", "<!-- fit: end -->"


def main() -> None:
    arguments = parse_arguments()
    if arguments.model:
        return print(json.dumps(one_run(arguments)))
    from grpo_ds.system.hardware import gpu_memory_gib

    runs = RUNS_ON_A_CARD if gpu_memory_gib() else RUNS_WITHOUT_A_CARD
    results = []
    for flags in runs:
        done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
        last = (done.stdout.splitlines() or [""])[-1]
        results.append(json.loads(last) if done.returncode == 0 else {"flags": flags, "error": last or done.returncode})
        print(last, file=sys.stderr)
    table = as_table(results)
    print(table)
    if arguments.docs:
        text = Path(arguments.docs).read_text(encoding="utf-8")
        (before, _), (_, after) = text.split(MARKERS[0]), text.split(MARKERS[1])
        Path(arguments.docs).write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", metavar="FILE", help="write the table between the markers of this file")
    parser.add_argument("--model", help="a preset; only this run")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--ds", default="ds_configs/zero2.json")
    parser.add_argument("--reference", default="int8")
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
    from grpo_ds.system.hardware import cpu_has_bf16, gpu_memory_gib

    with tempfile.TemporaryDirectory() as folder:
        random_model(arguments, Path(folder))
        config = TrainConfig(
            model=folder,
            batch_size=arguments.questions,
            num_generations=arguments.generations,
            max_prompt_length=arguments.prompt,
            max_completion_length=arguments.completion,
            pack_tokens=arguments.pack_tokens,
            gradient_checkpointing=True,
            reference=arguments.reference,
        )
        card = gpu_memory_gib()
        ds = resolve_ds_config(arguments.ds, fill=config.ds_sizes(bf16=card is not None or cpu_has_bf16()))
        shape = replace(shape_of(folder), name=arguments.model)
        plan = make_plan(shape, config, ds, device="cuda" if card else "cpu")
        if card and arguments.cap_gib:
            import torch

            torch.cuda.set_per_process_memory_fraction((arguments.cap_gib - CUDA_CONTEXT / GIB) / card)
        started = time.monotonic()
        uses = train(config, ds, plan)
    kinds: tuple[MemoryKind, ...] = ("gpu", "ram") if card else ("ram",)
    return {
        "model": arguments.model,
        "ds": arguments.ds,
        "reference": arguments.reference,
        "cap_gib": arguments.cap_gib,
        "tokens": f"{arguments.questions} x {arguments.generations} x ({arguments.prompt} + {arguments.completion})",
        "seconds": time.monotonic() - started,
        "peaks": {
            kind: {p.name: (p.bytes_in(kind), uses[p.name].peak(kind)) for p in plan.phases if p.name in uses}
            for kind in kinds
        },
    }


def random_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Save a bf16 checkpoint of the preset's shape with random weights and the embedded model's tokenizer.

    It is made in a separate process, so that its memory is free afterwards.
    """
    if os.fork():
        _, status = os.wait()
        if status:
            sys.exit("the model could not be made")
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from grpo_ds.models.embedded import embedded_folder
    from grpo_ds.models.shapes import PRESET_CONFIGS

    shape = dict(PRESET_CONFIGS[arguments.model])
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
    os._exit(0)


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


def as_table(results: list[dict[str, Any]]) -> str:
    """Return Markdown: planned / measured GiB of each phase, and the relative plan error."""
    import torch

    from grpo_ds.memory.plan import MEMORY_NAMES

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    lines = [f"`python benchmarks/fit.py` on {time.strftime('%Y-%m-%d')}: {card}, {os.cpu_count()} CPU cores "]
    lines[0] += f"({platform.processor() or platform.machine()}), torch {torch.__version__}. "
    lines[0] += "Planned / measured GiB (plan error)."
    phases = ["load", "initialise", "sample", "reference", "update", "step", "save"]
    lines += ["", "| run | cap | memory | " + " | ".join(phases) + " |", "|---" * (3 + len(phases)) + "|"]
    for result in results:
        if "error" in result:
            lines.append(f"| {' '.join(result['flags'])} | | | failed: {result['error']} |")
            continue
        run = f"{result['model']}, `{Path(result['ds']).name}`, {result['reference']}, {result['tokens']}"
        for kind, peaks in result["peaks"].items():
            cells = [peak_cell(*peaks[phase]) if phase in peaks else "" for phase in phases]
            lines.append(f"| {run} | {result['cap_gib'] or ''} | {MEMORY_NAMES[kind]} | " + " | ".join(cells) + " |")
            run = ""
    return "\n".join(lines)


def peak_cell(planned: int, measured: int) -> str:
    from grpo_ds.memory.plan import relative_plan_error

    error = relative_plan_error(measured, planned)
    return f"{planned / GIB:.2f} / {measured / GIB:.2f}" + ("" if error is None else f" ({error:+.0%})")


if __name__ == "__main__":
    main()
