"""Kinds of reference beside each other: seconds of a pass, the KL at the start, and the memory that each keeps.

    python benchmarks/reference.py [--model FOLDER] [--prompt 384] [--generations 8] [--completion 64] [--rounds 5]

One policy, and one reference of each kind made from it; they score the same rows in turn, round after round. The KL is
`kl_floor`, of completions that the policy draws. `kept` is counted: weights and scales of the reference. `resident` is
the growth of the process's own memory (RssAnon) by making it and by a pass; the pages of mapped files are the system's
and not in it. For a card the bytes that a pass brings over PCIe are counted, and their time computed.
"""

import argparse
import gc
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from grpo_ds.core.packing import pack_groups
from grpo_ds.memory.phases import _return_freed_memory
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.models.reference import kl_floor, make_reference
from grpo_ds.models.stored_weights import store_weights
from grpo_ds.settings.config import TrainConfig
from grpo_ds.system import ranks
from grpo_ds.system.hardware import native_precision
from grpo_ds.task.questions import read_questions
from grpo_ds.training.precision import DTYPES
from grpo_ds.training.prompt_style import prompt_style
from grpo_ds.training.sampling import Sampler

KINDS = ("int8", "bf16", "streamed")
PCIE = (12, 25)  # GB/s: PCIe 3 x16 and 4 x16, as measured on common boards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"prompt": 384, "generations": 8, "completion": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kinds", default=",".join(KINDS))
    typed = parser.parse_args()
    world, kinds = ranks.start(), typed.kinds.split(",")
    dtype = DTYPES[native_precision(on_gpu=torch.cuda.is_available())]
    model, tokenizer = load_policy(typed.model, dtype=dtype, checkpointing=False), load_tokenizer(typed.model)
    policy = LogprobModel(model, vocab_size=len(tokenizer), temperature=1.0, chunk_mib=64).eval()
    rows = drawn_rows(typed, model, tokenizer)
    made, grown = {}, {}
    for kind in kinds:
        before = own_memory()
        made[kind] = make_reference(policy, kind, partial(store_weights, policy, typed.model, None, world))
        made[kind](rows)
        grown[kind] = own_memory() - before
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(typed.rounds):
        for kind in kinds:
            start = time.perf_counter()
            made[kind](rows)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[kind].append(time.perf_counter() - start)
    print(f"{typed.model}, {str(dtype)[6:]}, {rows.input_ids.numel()} tokens in {len(rows.input_ids)} rows")
    print("| | seconds a pass | times int8's | KL at the start | kept, MB | resident, MB |\n|---|---|---|---|---|---|")
    first = statistics.median(times[kinds[0]])
    for kind in kinds:
        taken = statistics.median(times[kind])
        with torch.no_grad():
            floor = kl_floor(policy, made[kind], rows)
        kept = made[kind].bytes() / 1e6
        print(f"| {kind} | {taken:.2f} | {taken / first:.2f} | {floor:.1e} | {kept:.0f} | {grown[kind] / 1e6:.0f} |")
    embedding = model.get_input_embeddings().weight
    layers = 2 * sum(it.numel() for it in model.parameters() if it is not embedding)
    brought = layers + 2 * embedding.numel()  # the head, tied or not, and a few rows of the embedding
    seconds = ", ".join(f"{brought / 1e9 / speed:.2f} s at {speed} GB/s" for speed in PCIE)
    print(f"Streamed to a card: {brought / 1e9:.2f} GB a pass, computed {seconds}.")


def drawn_rows(typed, model, tokenizer):  # type: ignore[no-untyped-def]
    """Packed rows of a question's prompt and completions that the policy draws."""
    config = TrainConfig(model=typed.model, few_shot=2, max_prompt_length=typed.prompt)
    ids = prompt_style(config).encode(tokenizer, read_questions("sample").questions[:1])
    sampler = Sampler(model, tokenizer, max_completion_length=typed.completion, stop=config.answer_format.stop)
    drawn = sampler(ids, group_size=typed.generations, temperature=1.0, seed=0)
    prompts = [torch.tensor(prompt) for prompt in ids]
    return pack_groups(prompts, drawn.ids, drawn.mask, pad_id=0).to(model.device)


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    gc.collect()
    _return_freed_memory()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
