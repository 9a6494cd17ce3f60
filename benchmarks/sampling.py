"""Compare sampling with transformers' generate(): the same model, prompts and length, in turn; ratios of medians.

generate() gets the prompt repeated for every row, as is usual. On a card ours also runs with CUDA graphs, on a CPU with
bf16 also with torch's layers in place of one call a token.
Prompts and weights may be random, as only time is measured. Both sides draw from all ids of the model.

    python benchmarks/sampling.py [--questions 1] [--prompt 384] [--generations 8] [--completion 64] [--rounds 3]
        [--dtype float32] [--model smollm2-135m | --preset qwen2.5-1.5b]
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from decode_count import Words
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from grpo_ds.models.native_layers import can_decode_natively
from grpo_ds.models.policy import load_policy
from grpo_ds.models.shapes import PRESET_CONFIGS
from grpo_ds.training.sampling import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"questions": 1, "prompt": 384, "generations": 8, "completion": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    cuda = torch.cuda.is_available()
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--preset", choices=sorted(PRESET_CONFIGS), help="a preset's shape with random weights")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.preset:
        config = AutoConfig.for_model(**PRESET_CONFIGS[arguments.preset])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = load_policy(arguments.model, dtype=dtype, checkpointing=False)
    model.to("cuda" if cuda else "cpu").eval()
    words: Any = Words(model.config.vocab_size)
    sampler = Sampler(model, words, max_completion_length=arguments.completion)
    sampler.full_length = True
    shape = arguments.questions, arguments.prompt
    prompts = torch.randint(1000, 40000, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    rows = prompts.repeat_interleave(arguments.generations, dim=0)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=arguments.completion, eos_token_id=None, pad_token_id=0
    )

    def ours(graphs: bool = False, one_call: bool | None = None) -> None:
        sampler.cuda_graphs, sampler.one_call = graphs, one_call
        sampler(prompts.tolist(), group_size=arguments.generations, temperature=1.0)

    sides = {
        "generate()": lambda: model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings),
        "ours": lambda: ours(),
        **({"ours, CUDA graphs": lambda: ours(graphs=True)} if cuda else {}),
        **({"ours, torch's layers": lambda: ours(one_call=False)} if can_decode_natively(model) else {}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(arguments.rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if round_:  # the first round allocates and compiles
                seconds[name].append(time.perf_counter() - started)
        print({name: [round(s, 2) for s in taken] for name, taken in seconds.items()}, file=sys.stderr, flush=True)
    print_table(seconds, arguments)


def print_table(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    count = arguments.questions * arguments.generations
    title = f"{arguments.preset or arguments.model}, {arguments.dtype}, {count} rows of {arguments.completion} tokens "
    table = Table(title=f"{title}after {arguments.prompt}, medians of {arguments.rounds}")
    for header in ("", "seconds", "tokens/s", "faster than generate()"):
        table.add_column(header, justify="right" if header else "left")
    base = statistics.median(seconds["generate()"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        table.add_row(name, f"{median:.2f}", f"{count * arguments.completion / median:.0f}", f"{base / median:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
