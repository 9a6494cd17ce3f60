"""The plan against the simulated card, in every phase: models of two layers; `make card-sim` takes whole ones."""

from dataclasses import replace

import pytest
import torch

from grpo_ds.core.packing import pack_groups
from grpo_ds.memory.plan import GIB
from grpo_ds.memory.select import reserved
from tests.card.allocator import MIB, CachingAllocator
from tests.card.recorder import as_on_a_card
from tests.card.rows import ROOT, job_of, of_two_layers, readme_rows, rows, sizes
from tests.card.run import simulate
from tests.card.table import PHASES, Compared, as_table, out_of_bounds, planned_bytes

STEP = "--batch_size 2 --num_generations 4 --generation_batch_size 8 --logprob_chunk_mib 256"
ON, OFF = "--gradient_checkpointing true", "--gradient_checkpointing false"
JOBS = [
    f"--model qwen2.5-0.5b {OFF}",
    f"--model qwen2.5-1.5b {OFF}",
    f"--model qwen2.5-3b {ON} --ds ds_configs/zero2_lowram.json --batch_size 4 --num_generations 8",
    f"--model qwen2.5-1.5b {ON} --pack_tokens 1100",  # several backwards
    f"--model qwen2.5-0.5b {ON} --ds ds_configs/zero2_gpu.json",
    f"--model qwen2.5-1.5b {ON} --reference bf16 --generation_batch_size 64",
    f"--model qwen2.5-3b {ON} --lora_r 16",
    f"--model qwen2.5-7b {OFF} --lora_r 16 --load_in_4bit true",
]


@pytest.mark.parametrize("flags", JOBS)
def test_every_phase_is_planned_as_it_is_simulated(monkeypatch, flags):
    monkeypatch.chdir(ROOT)
    model, _, rest = flags.partition(" --gradient")
    job = of_two_layers(job_of(f"{model} {STEP} --gradient{rest}", 24, 64))
    simulated = simulate(job).allocated
    assert not out_of_bounds(planned_bytes(job), simulated)
    assert set(simulated) == set(PHASES)


def test_bounds_are_two_percent_under_and_five_over():
    def problems(planned, needed=1000 * GIB):
        return Compared({"step": planned * GIB, "load": 1}, {"step": 1000 * GIB}, needed, needed).problems()

    assert not problems(980) and not problems(1050) and problems(979) and problems(1051)
    assert not problems(1000, reserved(1000 * GIB)) and problems(1000, reserved(1000 * GIB) + 1)


def test_tensors_are_counted_from_their_first_to_their_last_use():
    with as_on_a_card() as recorder:
        first = torch.zeros(100, device="meta")
        view = first[10:]
        del first
        torch.zeros(7, device="meta")
        del view
        torch.zeros(50)  # in RAM
    assert recorder.events == [(1, 400), (2, 28), (2, 0), (1, 0)]


def test_a_gradient_that_only_autograd_holds_is_added_to_in_place():
    """As on a card: two gradients of 4 MiB, and no third for their sum."""
    with as_on_a_card() as recorder:
        weight, other = (torch.zeros(1024, 1024, device="meta", requires_grad=own) for own in (True, False))
        loss = (other @ weight).sum() + (other @ weight).sum()
        allocator, forward = CachingAllocator(), len(recorder.events)
        loss.backward()
    allocator.replay(recorder.events[:forward])
    kept = allocator.peak_allocated = allocator.allocated
    allocator.replay(recorder.events[forward:])
    assert allocator.peak_allocated - kept < 9 * MIB


def test_code_that_needs_values_is_counted_with_them():
    rows = pack_groups([torch.ones(6).long()], torch.ones(2, 3).long(), torch.ones(2, 3, dtype=torch.bool), pad_id=0)
    with as_on_a_card() as recorder:
        with recorder.host_counts():
            kept = rows.input_ids + 1  # 10 tokens of 8 bytes
        there = recorder.on_card(kept)
        del kept
        assert recorder.events == [(1, 80)] and there.shape == rows.input_ids.shape and there.is_cuda
        del there
    assert recorder.events == [(1, 80), (1, 0)]


def test_the_rows_are_those_of_the_readme_the_recipes_and_auto():
    table = "| 16 GB RAM | `--model a` (1, 2), `--model b` (3, 4) | the same | `--model c` (5, 6) |\n"
    table += "| 32 GB RAM | the same | the same, larger batches | `--model d` (7, 8) |"
    read = [(row.flags[-1], row.card, row.ram) for row in readme_rows(table)]
    a_and_b = [(name, card, ram) for ram in (16, 32) for card in (12, 16) for name in "ab"]
    assert sorted(read) == sorted([*a_and_b, ("c", 24, 16), ("d", 24, 32)])
    of = [row.of for row in rows()]
    assert of.count("configs") == 5 and of.count("README") >= 9 and of.count("docs/recipes.md") >= 9


def test_jobs_that_need_the_same_are_simulated_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = job_of("--model qwen2.5-1.5b", 16, 32)
    other = replace(job, config=replace(job.config, learning_rate=1.0))
    more = replace(job, config=replace(job.config, num_generations=16))
    assert sizes(job) == sizes(other) != sizes(more)


def test_a_line_of_the_table_has_planned_and_simulated_bytes(monkeypatch):
    monkeypatch.chdir(ROOT)
    row = next(rows_of for rows_of in rows() if rows_of.of == "configs")
    bytes_of = dict.fromkeys(PHASES, GIB)
    lines = as_table([row, row], [row.job()] * 2, [Compared(bytes_of, bytes_of, 2 * GIB, 3 * GIB)] * 2).splitlines()
    assert lines[-1].startswith(f"| `{row.flags}` | {row.card} |") and lines[-1].endswith("| 2.00 | 3.00 |")
    assert lines[-1].count("1.00 / 1.00") == 6 and lines[-2].startswith("|---")
