"""--dry_run_worst_case: one step with the longest prompts and completions; it changes nothing.

A run that would run out of memory does so now and not after an hour.
"""

from collections.abc import Iterator

import torch

from grpo_ds.core.packing import PackedRows
from grpo_ds.memory.plan import GIB, MemoryKind
from grpo_ds.training.rollout import micro_batches
from grpo_ds.training.trainer import Trainer

RARE_ID = 100  # token of the made-up prompts; any id works


def rehearse(trainer: Trainer) -> None:
    """Run every phase of a step at its largest size and print the peaks."""
    config, sampler, reference, guard = trainer.config, trainer.sampler, trainer.reference, trainer.guard
    prompts = [[RARE_ID] * config.max_prompt_length] * config.batch_size
    size, temperature = config.num_generations, config.temperature
    total = len(prompts) * size * trainer.world.size
    with sampler.to_full_length(), trainer.console.progress("Worst case, sampling", total, "completions") as advance:
        completions = guard.run("sample", sampler, prompts, group_size=size, temperature=temperature, advance=advance)
    tensors = trainer.row_prompts([torch.tensor(prompt, device=completions.ids.device) for prompt in prompts])

    def packed() -> Iterator[PackedRows]:
        yield from (rows for rows, _ in micro_batches(tensors, completions, trainer.limits.tokens))

    if reference:
        guard.run("reference", lambda: [reference(rows) for rows in packed()])
    guard.run("update", lambda: trainer.engine.rehearse(packed()))
    kind: MemoryKind = "gpu" if trainer.world.device.type == "cuda" else "ram"
    peaks = ", ".join(f"{use.phase} {use.peak(kind) / GIB:.1f}" for use in trainer.profiler.uses().values())
    trainer.console.line(
        f"Worst case rehearsed: {config.max_prompt_length} + {config.max_completion_length} tokens; "
        f"GiB at the peak of each phase: {peaks}"
    )
