"""Decoding on a card: tokens/s with and without CUDA graphs, beside what the weights' bytes allow.

Floor: each token of all rows reads every weight once, at the bandwidth of a copy on this card. Weights and prompts are
random; completions have their full length. The first rollout allocates and captures and is not counted.

    python benchmarks/card_decode.py --model qwen2.5-1.5b [--questions 2] [--generations 4] [--prompt 512]
        [--completion 300] [--rounds 3] [--weights DIR]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from random_weights import random_model

COPIED = 1 << 30  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"questions": 2, "generations": 4, "prompt": 512, "completion": 300, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--weights", type=Path, help="folder that keeps the random weights for the next run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        folder = random_model(arguments.model, arguments.weights or Path(own))
        print(json.dumps({"model": arguments.model, **measure(folder, arguments)}))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens/s of all rows together for both ways, and the floor."""
    import torch

    from grpo_ds.models.policy import load_policy, load_tokenizer
    from grpo_ds.training.sampling import Sampler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_policy(str(folder), dtype=torch.bfloat16, checkpointing=False).to(device).eval()
    sampler = Sampler(model, load_tokenizer(str(folder)), max_completion_length=arguments.completion)
    sampler.full_length = True
    prompts = torch.randint(1000, 40000, (arguments.questions, arguments.prompt)).tolist()
    rows = arguments.questions * arguments.generations
    ways: dict[str, float] = {}
    for sampler.cuda_graphs in (False, True) if device == "cuda" else (False,):
        seconds = [rollout(sampler, prompts, arguments.generations) for _ in range(arguments.rounds + 1)]
        ways["graphs" if sampler.cuda_graphs else "kernels"] = statistics.median(seconds[1:])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copied = bytes_per_second(device)
    return {
        "rows": f"{arguments.questions} x {arguments.generations} x ({arguments.prompt} + {arguments.completion})",
        "tokens_per_second": {way: rows * arguments.completion / took for way, took in ways.items()},
        "floor_tokens_per_second": rows * copied / weights,
        "weights_gb": weights / 1e9,
        "copy_gb_per_second": copied / 1e9,
    }


def rollout(sampler: Any, prompts: list[list[int]], group_size: int) -> float:
    """Return the seconds of one rollout; the result is on the CPU when the sampler returns it."""
    started = time.perf_counter()
    sampler(prompts, group_size=group_size, temperature=1.0).ids.cpu()
    return time.perf_counter() - started


def bytes_per_second(device: str) -> float:
    """Bytes that a copy reads and writes in a second, the best of ten."""
    import torch

    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize() if device == "cuda" else None
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED / best


if __name__ == "__main__":
    main()
