"""Time the matrix products of a decoding step on a CPU: few rows, bf16 and 8-bit weights, in turn; medians.

The copies of a weight are larger than the caches together, as in a model, so that each product reads memory.

    python benchmarks/decode_products.py [--preset qwen2.5-0.5b] [--rows 8] [--rounds 6]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_ds.models.shapes import PRESET_CONFIGS

MEMORY = 160e6  # bytes of all copies of a bf16 weight
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_key_value_heads": 3, "num_attention_heads": 9}


def weights(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the products of a layer, and of the head."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {"q, o": (hidden, hidden), "k, v": (hidden, keys), "gate, up": (hidden, mlp), "down": (mlp, hidden)}
    return {**layer, "head": (hidden, config["vocab_size"])}


def ways(x: Tensor, copies: list[Tensor]) -> dict[str, tuple[Callable[[int], Tensor], int]]:
    """Ways to multiply x with the i-th copy of a weight, and bytes of a weight's element."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, len(x)) for w in copies]
    scales = copies[0].float().abs().amax(dim=1) / 127
    integers = (copies[0].float() / scales[:, None]).round().to(torch.int8)
    int8 = [integers.clone() for _ in copies]
    torch.backends.quantized.engine = "fbgemm"
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    quantized = torch.quantize_per_channel(copies[0].float(), scales, zeros, 0, torch.qint8)
    dynamic = [torch.ops.quantized.linear_prepack(quantized, None) for _ in copies]
    pointwise = torch.ops.mkldnn._linear_pointwise
    return {
        "bf16, as it is": (lambda i: F.linear(x, copies[i]), 2),
        "bf16, packed": (lambda i: pointwise(x, packed[i], None, "none", [], ""), 2),
        "int8 (_weight_int8pack_mm)": (lambda i: torch.ops.aten._weight_int8pack_mm(x, int8[i], scales.to(x)), 1),
        "int8, activations too": (partial(_dynamic, x.float(), dynamic), 1),
    }


def _dynamic(x: Tensor, weights: list[Tensor], i: int) -> Tensor:
    return torch.ops.quantized.linear_dynamic(x, weights[i], False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESET_CONFIGS), help="default: the shape of smollm2-135m")
    for name, default in {"rows": 8, "rounds": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_channel.*")
    config = PRESET_CONFIGS[arguments.preset] if arguments.preset else {**SMOLLM2, "vocab_size": 49152}
    print("| product | way | us | GB/s | x bf16, as it is |\n|---|---|---|---|---|")
    for name, (inputs, outputs) in weights(config).items():
        count = max(1, min(60, int(MEMORY / (2 * inputs * outputs))))
        weight = (torch.randn(outputs, inputs) * 0.02).bfloat16()
        sides = ways(torch.randn(arguments.rows, inputs).bfloat16(), [weight.clone() for _ in range(count)])
        seconds: dict[str, list[float]] = {way: [] for way in sides}
        for _ in range(arguments.rounds + 1):
            for way, (product, _) in sides.items():
                started = time.perf_counter()
                for i in range(count):
                    product(i)
                seconds[way].append((time.perf_counter() - started) / count)
        medians = {way: statistics.median(taken[1:]) for way, taken in seconds.items()}
        for way, median in medians.items():
            speed, faster = sides[way][1] * inputs * outputs / median / 1e9, medians["bf16, as it is"] / median
            print(
                f"| {name} {inputs} x {outputs} | {way} | {median * 1e6:.0f} | {speed:.1f} | {faster:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
