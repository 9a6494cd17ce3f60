"""RAM per parameter under ZeRO-2 offload, for each way to keep the master weights.

Each way trains a model of Qwen2.5-0.5B's shape (random weights, bf16) in a separate process: real DeepSpeed, real
backward, real optimizer step. The storages of all live tensors are counted, except those that a GPU would hold:
weights, their gradients, the reduce bucket. On a machine without a GPU these are in RAM too, so the growth of resident
memory is compared with the count of everything.

    python benchmarks/ram.py [--layers 24] [--steps 2] [--json FILE]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOWRAM7 = {"moments": "companded", "rounding": "residual8"}
WAYS = {  # name -> (section bf16, parameters of AdamW8bit or SGD, goal in bytes per parameter)
    "own staging copy": ({}, {"share_staging": False}, 12.1),
    "zero2.json: staging shared": ({}, {}, 10.1),
    "zero2_lowram.json: bf16 + residual": ({"bf16_master_weights_and_grads": True}, {}, 8.1),
    "zero2_lowram7.json: bf16 + residual of 8 bits": ({"bf16_master_weights_and_grads": True}, LOWRAM7, 7.1),
    "zero2_lowram.json, stochastic rounding": (
        {"bf16_master_weights_and_grads": True},
        {"rounding": "stochastic"},
        6.1,
    ),
    "zero2_sgd.json: bf16 + residual": ({"bf16_master_weights_and_grads": True}, {}, 6.1),
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.way:
        return print(json.dumps(measure(arguments)))
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--layers", str(arguments.layers)]
        command += ["--steps", str(arguments.steps)]
        # Makes the C library return freed memory; otherwise resident memory stays at the peak of the backward pass.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way}: {rows[way]}", file=sys.stderr)
    print_table(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="layers of the model; 24 (default) make 0.5B")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default 2)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return bytes per parameter, between steps and at the peak of a step; counts and resident memory in bytes."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    import torch

    from grpo_ds.core.packing import pack_groups
    from grpo_ds.memory.phases import reset_resident_peak, resident_memory
    from grpo_ds.system import ranks
    from grpo_ds.training import engine as engine_module  # imported before the count, which leaves out its libraries

    assert engine_module
    ranks.start()
    torch.ones(64, 64) @ torch.ones(64, 64)
    _, before = resident_memory()
    engine = build_engine(arguments)
    parameters = sum(p.numel() for p in engine.policy.parameters())
    largest = max(p.numel() for p in engine.policy.parameters())
    ids = torch.randint(0, 1000, (2, 4))
    rows = pack_groups([torch.arange(8)], ids, torch.ones_like(ids, dtype=torch.bool), pad_id=0)
    at_peak = 0
    for _ in range(arguments.steps):
        engine.backward(-engine(rows).mean())
        gc.collect()
        at_start, _ = alive(engine)
        reset_resident_peak()
        _, start = resident_memory()
        engine.step()
        at_peak = max(at_peak, at_start + resident_memory()[0] - start)
    ram, gpu = alive(engine)
    grown = resident_memory()[1] - before
    return {
        "parameters": parameters,
        "bytes_per_parameter": ram / parameters,
        "in_a_step_bytes_per_parameter": at_peak / parameters,
        "counted": ram + gpu,
        "resident": grown,
        "largest_parameter": largest,
    }


def build_engine(arguments: argparse.Namespace):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_ds.models.logprob_model import LogprobModel
    from grpo_ds.settings.ds_config import DsSizes, resolve_ds_config
    from grpo_ds.training.engine import Engine

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=arguments.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    model.tie_weights()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on the meta device
    model.train()
    bf16, params, _ = WAYS[arguments.way]
    ds = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True, **bf16},
        "optimizer": {"type": "SGD" if "sgd" in arguments.way else "AdamW8bit", "params": params},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ds, file)
        file.flush()
        resolved = resolve_ds_config(file.name, fill=DsSizes(1e-6, 0.0, 1.0, 0, 2, 2, 1))
    return Engine(LogprobModel(model, vocab_size=151_936, temperature=1.0, chunk_mib=16), resolved)


def alive(engine) -> tuple[int, int]:
    """Return the bytes of all live tensors: those in RAM, and those that a GPU would hold."""
    import torch

    zero = engine._engine.optimizer
    on_card = [*engine.policy.parameters(), *engine.policy.buffers(), *zero.bit16_groups_flat]
    on_card += [p.grad for p in engine.policy.parameters() if p.grad is not None]
    on_card += [buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer]
    card = {t.untyped_storage().data_ptr() for t in on_card}
    gc.collect()
    sizes = {}
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [master.grad for master in zero.single_partition_of_fp32_groups]  # gc does not list gradients
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(n for ptr, n in sizes.items() if ptr not in card), sum(n for ptr, n in sizes.items() if ptr in card)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"RAM, {next(iter(rows.values()))['parameters'] / 1e6:.0f} M parameters")
    for header in ("masters", "goal B/param", "between steps", "in a step", "all counted GB", "resident growth GB"):
        table.add_column(header, justify="right" if header != "masters" else "left")
    for way, row in rows.items():
        table.add_row(
            way,
            f"{WAYS[way][2]}",
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['in_a_step_bytes_per_parameter']:.2f}",
            f"{row['counted'] / 1e9:.2f}",
            f"{row['resident'] / 1e9:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
