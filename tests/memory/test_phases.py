"""Measured phases: their peaks, and the message of a phase that runs out of memory."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from grpo_ds.memory.limits import Limits
from grpo_ds.memory.phases import CLEAR, OutOfMemory, PhaseUse, Profiler, Span
from grpo_ds.memory.plan import GIB, PhasePlan, Plan
from grpo_ds.report.memory_measured import compare, diagnosis, write_memory
from tests.conftest import check_example

MB = 2**20
PLAN = Plan((PhasePlan("sample", {}, {"weights": 2 * GIB, "KV cache": GIB}), PhasePlan("update", {}, {"weights": GIB})))
needs_proc = pytest.mark.skipif(not CLEAR.exists(), reason="peaks by phase come from Linux's /proc")


@pytest.mark.parametrize("cls", [Span, PhaseUse, Limits])
def test_the_example_of_a_data_class_is_right(cls):
    check_example(cls)


def exact_profiler():
    """Return a profiler whose first phase does not include memory that other tests have freed."""
    return Profiler(torch.device("cpu"), exact=True)


@needs_proc
def test_a_peak_belongs_to_the_phase_that_made_it():
    profiler = exact_profiler()
    with profiler.phase("small"):
        pass
    with profiler.phase("large"):
        torch.ones(64 * MB)  # 256 MB, gone at the end of the line
    with profiler.phase("small"):
        pass
    uses = profiler.uses()
    assert uses["large"].ram_peak - uses["small"].ram_peak > 200 * MB
    assert profiler.peak("ram") == uses["large"].ram_peak


@needs_proc
def test_an_inner_phase_takes_its_time_and_peak_from_the_outer_one():
    profiler = exact_profiler()
    with profiler.phase("outer"):
        with profiler.phase("inner"):
            torch.ones(64 * MB)
        kept = len(profiler.spans)
    assert [span.phase for span in profiler.spans] == ["outer", "inner", "outer"] and kept == 2
    uses = profiler.uses()
    assert uses["inner"].ram_peak - uses["outer"].ram_peak > 200 * MB
    assert sum(use.seconds for use in uses.values()) == pytest.approx(
        profiler.spans[-1].start + profiler.spans[-1].seconds - profiler.spans[0].start, abs=0.05
    )
    assert set(profiler.uses(first=2)) == {"outer"}


def test_an_ordinary_error_passes_through():
    profiler = Profiler(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shapes"), profiler.phase("update"):
        raise RuntimeError("shapes do not match")
    with profiler.phase("sample"):
        pass
    assert profiler.spans[-1].phase == "sample"


def test_a_full_card_is_named_with_its_phase_its_plan_and_what_helps():
    plan = Plan((PhasePlan("update", {"weights": 3 * GIB}, {}),))
    with pytest.raises(OutOfMemory) as caught, Profiler(torch.device("cpu"), plan).phase("update"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.\nmore\nlines")
    words = str(caught.value)
    assert caught.value.exit_code == 5 and len(words.splitlines()) <= 6
    for word in (
        "Out of GPU memory",
        "'update'",
        "3.0 GiB were planned",
        "1.16 GiB",
        "--gradient_checkpointing true",
        "--pack_tokens",
    ):
        assert word in words


FILL_RAM = """
import resource, torch
from grpo_ds.system.script import run_script
from grpo_ds.memory.phases import Profiler
def main(argv):
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    with Profiler(torch.device("cpu")).phase("step"):
        [torch.empty(2**30) for _ in range(4)]
run_script(main)
"""


def test_ram_that_is_really_full_ends_in_the_same_message():
    done = subprocess.run([sys.executable, "-c", FILL_RAM], capture_output=True, text=True)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert "Out of RAM in phase 'step'" in done.stderr and "zero2_lowram7.json" in done.stderr


def test_the_comparison_says_how_far_the_plan_was_off_and_what_binds():
    profiler = Profiler(torch.device("cpu"), PLAN)
    for phase in ("sample", "update", "evaluate"):
        with profiler.phase(phase):
            pass
    rows = compare(list(profiler.uses().values()), PLAN, "ram")
    assert [row.planned for row in rows] == [3 * GIB, GIB, None]
    assert rows[0].error == pytest.approx((rows[0].measured - 3 * GIB) / rows[0].measured)
    assert rows[2].error is None
    sample_binds = [rows[0]]
    assert diagnosis(sample_binds, PLAN, "ram").endswith("mostly weights (2.00), KV cache (1.00).")


def test_the_timeline_opens_offline_and_the_json_holds_everything(tmp_path):
    profiler = Profiler(torch.device("cpu"), PLAN)
    with profiler.phase("sample"), profiler.phase("evaluate"):
        pass
    json_file, svg_file = write_memory(profiler, tmp_path)
    report = json.loads(json_file.read_text())
    assert {use["phase"] for use in report["measured"]} == {"sample", "evaluate"}
    assert report["planned"]["sample"]["ram"] == {"weights": 2 * GIB, "KV cache": GIB}
    assert len(report["spans"]) == 3
    svg = svg_file.read_text()
    ET.fromstring(svg)
    assert 'href="http' not in svg and "url(http" not in svg  # its metadata names vocabularies, and loads nothing


def test_a_run_of_every_phase_there_is_can_be_drawn(tmp_path):
    profiler, phases = Profiler(torch.device("cpu")), [f"phase {i}" for i in range(25)]
    for phase in phases:
        with profiler.phase(phase):
            pass
    _, drawing = write_memory(profiler, tmp_path)
    assert [drawing.read_text().count(f"<!-- {phase} -->") for phase in phases] == [1] * 25
