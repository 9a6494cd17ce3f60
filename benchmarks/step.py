"""Compare a complete training step with TRL's GRPOTrainer: same weights, prompts, shapes, dtype and number of threads.

Each side has a separate process. They take steps in turn while the other is stopped, so that other load on the
machine slows both; ratios are ratios of medians. Completions have their full length, so that both sides do the same
work; with --free they may end. On a card both run under ZeRO-2 with the optimizer in RAM, and --preset takes a Qwen's
shape with random weights. Needs the extra `benchmark`.

TRL runs with its defaults (gradient checkpointing on); ours uses checkpointing if the memory plan has no room for
all activations, or as --checkpointing says.

    python benchmarks/step.py [--questions 1] [--prompt 384] [--generations 8] [--completion 64] [--steps 3]
        [--dtype float32] [--model smollm2-135m | --preset qwen2.5-1.5b] [--data FILE] [--beta 0.04] [--free]
        [--checkpointing auto] [--json FILE]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_weights import random_model
from uneven_reward import spread

SIDES = ("ours", "TRL")
PHASES = ("sample", "reference", "update", "total")  # update includes the optimizer's step
GIB = 2**30


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        return ours(arguments) if arguments.side == "ours" else trl(arguments)
    if arguments.preset:
        parent = arguments.weights or Path(tempfile.mkdtemp())
        sys.argv += ["--model", str(random_model(arguments.preset, parent))]
    command = [sys.executable, __file__, *sys.argv[1:], "--side"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = {side: subprocess.Popen([*command, side], **pipes) for side in SIDES}
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for worker in workers.values():
        answer(worker)  # ready
        worker.send_signal(signal.SIGSTOP)
    for step in range(arguments.steps + 1):
        for side, worker in workers.items():
            worker.send_signal(signal.SIGCONT)
            worker.stdin.write("go\n")
            worker.stdin.flush()
            taken = answer(worker)
            worker.send_signal(signal.SIGSTOP)
            if step:  # the first step allocates and compiles
                results[side].append(taken)
            print(side, json.dumps(taken), file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.kill()
    print_table(results, arguments)
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"arguments": vars(arguments), **results}, indent=2, default=str) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"questions": 1, "prompt": 384, "generations": 8, "completion": 64, "steps": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--preset", choices=("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"))
    parser.add_argument("--weights", type=Path, help="folder that keeps the preset's random weights for the next run")
    parser.add_argument("--data", help="take the prompts from the contexts of these questions; default: single words")
    parser.add_argument("--checkpointing", choices=("auto", "true", "false"), default="auto", help="of our side")
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--free", action="store_true", help="completions may end")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def answer(worker: Any) -> dict[str, float]:
    """Return the next result of a worker, skipping lines that libraries print."""
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a worker ended with {worker.wait()}")


def report(values: dict[str, float]) -> None:
    print(json.dumps(values), flush=True)


def wait_for_go() -> None:
    if not sys.stdin.readline():
        sys.exit(0)


def peaks() -> dict[str, float]:
    """Return this process's peaks in GiB: of RAM, and of GPU memory (0 without a card)."""
    import torch

    from grpo_ds.memory.phases import resident_memory

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"ram_gib": resident_memory()[0] / GIB, "gpu_gib": gpu / GIB}


def start_alone() -> None:
    """Set the rendezvous variables of one rank: without them DeepSpeed looks for MPI."""
    from grpo_ds.system.ranks import _free_port

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(_free_port()))


def prompts(tokenizer: Any, arguments: argparse.Namespace) -> list[str]:
    """Return texts of exactly --prompt tokens: cut from the data's contexts, or words of one token each."""
    if arguments.data:
        from grpo_ds.task.questions import read_questions

        text = " ".join(question.context for question in read_questions(arguments.data).questions)
        ids = tokenizer(text[: 100 * arguments.prompt * arguments.questions])["input_ids"]
        starts = [q * arguments.prompt * 2 for q in range(arguments.questions)]
        return [cut_to(tokenizer, ids[start:], arguments.prompt) for start in starts]
    words = [
        text
        for text in (tokenizer.decode([i]) for i in range(300, 8000))
        if text.startswith(" ") and text[1:].isalpha()
    ]
    texts = ["".join(words[q : q + arguments.prompt]) for q in range(arguments.questions)]
    assert all(len(tokenizer(text)["input_ids"]) == arguments.prompt for text in texts)
    return texts


def cut_to(tokenizer: Any, ids: list[int], length: int) -> str:
    """Return the first text of these tokens that is encoded as exactly `length` tokens."""
    for first in range(length):
        text = tokenizer.decode(ids[first : first + length])
        if len(tokenizer(text)["input_ids"]) == length:
            return text
    raise SystemExit(f"no text of {length} tokens found")


def ours(arguments: argparse.Namespace) -> None:
    from grpo_ds.memory.select import Job, fitted
    from grpo_ds.models.shapes import shape_of
    from grpo_ds.report.console import Console
    from grpo_ds.settings.config import TrainConfig
    from grpo_ds.settings.ds_config import resolve_ds_config
    from grpo_ds.system import ranks
    from grpo_ds.system.hardware import Precision, gpu_memory_gib, ram_gib
    from grpo_ds.task.questions import read_questions
    from grpo_ds.training.prompt_style import PromptStyle
    from grpo_ds.training.trainer import Trainer

    config = TrainConfig(
        model=arguments.model,
        batch_size=arguments.questions,
        num_generations=arguments.generations,
        max_prompt_length=arguments.prompt,
        max_completion_length=arguments.completion,
        beta=arguments.beta,
        gradient_checkpointing={"auto": None, "true": True, "false": False}[arguments.checkpointing],
    )
    native: Precision = "bf16" if arguments.dtype == "bfloat16" else "fp32"
    ds = resolve_ds_config("ds_configs/zero2.json", fill=config.ds_sizes(native=native))
    card = gpu_memory_gib()
    job = fitted(Job(shape_of(config.model), config, ds, "cuda" if card else "cpu"), card or 0, ram_gib())
    config = job.config
    rewards = {"spread": (lambda completions, **_: spread(completions), 1.0)}

    class Fixed(PromptStyle):
        def encode(self, tokenizer: Any, questions: Any) -> list[list[int]]:
            return [tokenizer(text)["input_ids"] for text in prompts(tokenizer, arguments)][: len(questions)]

    style = Fixed(config.answer_format, 0, False, arguments.prompt)
    trainer = Trainer(config, ds, ranks.start(), Console(speaks=False), rewards, style=style)
    trainer.sampler.full_length = not arguments.free
    questions = list(read_questions("sample").questions)
    trainer.make_reference(questions)
    if arguments.preset:  # use all rows of the head; the embedded model's tokenizer has fewer ids
        for model in (trainer.engine.policy, *([trainer.reference.model] if trainer.reference else [])):
            model.options["vocab_size"] = trainer.engine.model.config.vocab_size
    report({})
    for step in range(1000):
        wait_for_go()
        started = time.perf_counter()
        metrics = trainer.step(step, questions)
        total = time.perf_counter() - started
        seconds = {phase: metrics[f"seconds/{phase}"] for phase in ("sample", "reference", "update", "step")}
        seconds["update"] += seconds.pop("step")
        # Our profiler restarts torch's and the system's peaks at every phase, so its own are asked.
        peak = {f"{kind}_gib": trainer.profiler.peak(kind) / GIB for kind in ("ram", "gpu")}
        report({**seconds, "total": total, **peak, "length": metrics["completions/mean_length"]})


# Our ds_configs/zero2.json, with the keys that transformers fills.
ZERO2 = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 25_000_000},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def trl_config(arguments: argparse.Namespace) -> Any:
    """Return TRL's defaults, except for the values that fix the work."""
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=arguments.questions * arguments.generations,
        num_generations=arguments.generations,
        max_completion_length=arguments.completion,
        beta=arguments.beta,
        learning_rate=1e-6,
        gradient_checkpointing=True,
        bf16=arguments.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=ZERO2 if torch.cuda.is_available() else None,
        max_steps=1000,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        generation_kwargs={} if arguments.free else {"min_new_tokens": arguments.completion},
    )


def trl(arguments: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from grpo_ds.models.policy import model_source

    if torch.cuda.is_available():  # only there TRL runs under DeepSpeed
        start_alone()
    source = model_source(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    texts = prompts(tokenizer, arguments)

    class OnCommand(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_go()
            clock.clear()
            clock["began"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            total = time.perf_counter() - clock.pop("began")
            sample, scored = clock["_generate"], clock["_generate_and_score_completions"]
            seconds = {"sample": sample, "reference": scored - sample, "update": total - scored, "total": total}
            report({**seconds, **peaks(), "length": float(arguments.completion)})

    clock: dict[str, float] = {}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: spread(completions),
        args=trl_config(arguments),
        train_dataset=Dataset.from_dict({"prompt": texts * 1000}),
        processing_class=tokenizer,
        callbacks=[OnCommand()],
    )

    def timed(name: str) -> None:
        method = getattr(trainer, name)

        def call(*positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = method(*positional, **named)
            clock[name] = time.perf_counter() - started
            return result

        setattr(trainer, name, call)

    timed("_generate")
    timed("_generate_and_score_completions")
    report({})
    trainer.train()


def print_table(results: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = f"{arguments.questions} x {arguments.generations} x ({arguments.prompt} + {arguments.completion})"
    table = Table(title=f"{arguments.model}, {arguments.dtype}, {shape} tokens, medians of {arguments.steps} steps")
    for header in ("", *SIDES, "TRL / ours", "pair by pair"):
        table.add_column(header, justify="right" if header else "left")
    for phase in PHASES:
        one, two = ([step[phase] for step in results[side]] for side in SIDES)
        pairs = [b / a for a, b in zip(one, two, strict=True)]
        medians = statistics.median(one), statistics.median(two)
        cells = [f"{medians[0]:.2f} s", f"{medians[1]:.2f} s", f"{medians[1] / medians[0]:.2f}"]
        table.add_row(phase, *cells, f"{min(pairs):.2f} to {max(pairs):.2f}")
    tokens = [
        statistics.median(s["length"] * arguments.questions * arguments.generations / s["total"] for s in results[side])
        for side in SIDES
    ]
    table.add_row("tokens/s", *(f"{rate:.1f}" for rate in tokens), f"{tokens[1] / tokens[0]:.2f}", "")
    for kind in ("gpu", "ram"):
        one, two = (max(step[f"{kind}_gib"] for step in results[side]) for side in SIDES)
        if one:
            table.add_row(f"peak {kind.upper()}, GiB", f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
