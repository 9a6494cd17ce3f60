"""benchmarks/card.py: budget, records, tables and the real runs of its first stage, all without a card."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from grpo_ds.memory.plan import PhasePlan, make_plan
from grpo_ds.memory.select import fits
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from tests import test_gpu
from tests.sdpa import KernelsChosen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import card  # noqa: E402
import card_stages  # noqa: E402
import card_tables  # noqa: E402
from card_parts import Line, Part, Record, expected_seconds, read_lines, run_stage  # noqa: E402
from fit import RUNS_ON_A_CARD, parse_arguments  # noqa: E402

CARD = "Trivial Card"


def trivial(name: str, code: str, seconds: float = 5.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, seconds, ("-c", code), needs)


SAYS = "print('loading'); print('{\"figure\": 3}'); print('bye')"
PARTS = [
    trivial("says", SAYS),
    trivial("writes", "import sys; open('{json}', 'w').write('{\\n\"figure\": 4\\n}')"),
    trivial("fails", "print('{\"figure\": 5}'); raise SystemExit('it is wrong')"),
    trivial("lacks", SAYS, needs=("json", "a_package_that_is_not_there")),
    trivial("takes long", SAYS, seconds=1000.0),
    trivial("is short", SAYS),
]


def run(parts, file, **options):
    return run_stage(parts, Record(file, CARD, "2.13"), **{"budget_s": 60.0, "environment": {}, **options})


def test_every_part_leaves_a_line_and_a_part_too_long_for_the_budget_is_not_begun(tmp_path):
    lines = {line.part: line for line in run(PARTS, tmp_path / "stage.jsonl")}
    assert {name: line.outcome for name, line in lines.items()} == {
        "says": "passed", "writes": "passed", "fails": "failed", "lacks": "skipped", "takes long": "left",
        "is short": "passed",
    }  # fmt: skip
    assert [lines[name].figures for name in ("says", "writes", "fails")] == [{"figure": n} for n in (3, 4, 5)]
    assert "it is wrong" in lines["fails"].why and lines["lacks"].why == "a_package_that_is_not_there: not installed"
    written = [line.part for line in read_lines(tmp_path / "stage.jsonl")]
    assert written == ["says", "writes", "fails", "lacks", "is short"]
    assert card.exit_code(list(lines.values())) == card.FAILED


def test_a_second_call_runs_what_has_not_passed_and_again_runs_all(tmp_path):
    file, count = tmp_path / "stage.jsonl", tmp_path / "count"
    counted = f"open({str(count)!r}, 'a').write('x'); import os; assert os.path.exists({str(tmp_path / 'fixed')!r})"
    parts = [trivial("passes", f"open({str(count)!r}, 'a').write('y')"), trivial("is mended", counted)]
    assert card.exit_code(run(parts, file)) == card.FAILED
    (tmp_path / "fixed").touch()
    assert [line.outcome for line in run(parts, file)] == ["passed", "passed"]
    assert count.read_text() == "yxx"
    assert card.exit_code(run(parts, file)) == 0 and count.read_text() == "yxx"
    run(parts, file, again=True)
    assert count.read_text() == "yxxyx"


def test_what_one_card_has_passed_another_has_not(tmp_path):
    file = tmp_path / "stage.jsonl"
    run(PARTS[:1], file)
    run_stage(PARTS[:1], Record(file, "Another Card"), budget_s=60.0, environment={})
    assert [line.card for line in read_lines(file)] == [CARD, "Another Card"]


def has_ended(pid: int) -> bool:
    """Return True once a killed process has ended: the kernel may need a moment."""
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    return time.monotonic() < end


def test_a_part_that_lasts_too_long_is_killed_with_what_it_started_and_then_expected_to_last_longer(tmp_path):
    forks = (
        f"import os, time; os.fork() or open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    file, part = tmp_path / "stage.jsonl", trivial("lasts", forks, seconds=0.5)
    (line,) = run([part], file, budget_s=10.0)  # enough to begin on a busy machine
    assert line.outcome == "cut" and card.exit_code([line]) == card.LEFT
    assert has_ended(int((tmp_path / "child").read_text()))
    (line,) = run([part], file, budget_s=10.0)  # now about 1.2 * 10 s are expected
    assert line.outcome == "left"


def test_a_part_is_expected_to_last_a_little_longer_than_it_did():
    line = Line("x", "passed", 100.0, {}, "", CARD, "", "")
    assert expected_seconds(PARTS[4], line) == pytest.approx(120.0)
    assert expected_seconds(PARTS[4], replace(line, outcome="failed")) == 1000.0
    assert expected_seconds(PARTS[4], replace(line, outcome="cut")) == 1000.0
    assert expected_seconds(PARTS[4], None) == 1000.0


STAGE_IN_A_PROCESS = """
import signal, sys
sys.path.insert(0, "benchmarks")
from pathlib import Path
from card_parts import Part, Record, run_stage
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
waits = "import os, time; open(CHILD, 'w').write(str(os.getpid())); time.sleep(60)"
parts = [Part("short", 5, ("-c", "print('{}')")), Part("long", 5, ("-c", waits))]
run_stage(parts, Record(Path(FILE), "Trivial Card"), budget_s=60, environment={})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_that_is_killed_keeps_what_is_done(tmp_path, number):
    file, child = tmp_path / "stage.jsonl", tmp_path / "child"
    script = STAGE_IN_A_PROCESS.replace("CHILD", repr(str(child))).replace("FILE", repr(str(file)))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait()
    if number == signal.SIGKILL:  # nobody was there to end the part
        os.kill(int(child.read_text()), signal.SIGKILL)
    else:
        assert has_ended(int(child.read_text()))
    assert [line.part for line in read_lines(file)] == ["short"]
    with file.open("a") as cut:
        cut.write('{"part": "torn, "outc')  # a line that was cut while it was written
    assert [line.outcome for line in run([trivial("short", "1 / 0"), PARTS[0]], file)] == ["passed", "passed"]
    assert [line.part for line in read_lines(file)] == ["short", "says"]


def command(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/card.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("stage", card_stages.STAGES)
def test_without_a_card_a_stage_says_so_in_a_line(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "probe", lambda: {"card": "", "torch": "2.13"})
    monkeypatch.setattr(sys, "argv", ["card.py", "--stage", str(stage), "--out", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        card.main()
    assert ended.value.code == card.NO_CARD == 69
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"stage {stage} (") and "no card" in line and not list(tmp_path.iterdir())


def test_a_tiny_run_passes_under_the_real_launcher_without_a_card(tmp_path):
    done = command("--stage", "1", "--device", "cpu", "--only", "zero2.json, int8", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "stage1.jsonl").read_text()
    (line,) = read_lines(tmp_path / "stage1.jsonl")
    assert line.card == "CPU" and line.figures["resumed_bit_for_bit"] and line.figures["steps"] == 4
    assert min(line.figures["gradient_norms"]) > 0.1  # it learned something that could differ


def test_other_stages_measure_a_card_and_refuse_the_cpu():
    done = command("--stage", "4", "--device", "cpu")
    assert done.returncode == 1 and "stage 1 alone" in done.stderr


def test_a_run_that_differs_after_resuming_is_named():
    from card_run import differences

    one = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}], {"model.safetensors": "a"}
    other = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}], {"model.safetensors": "b"}
    assert differences(one, one) == {"resumed_bit_for_bit": True}
    assert differences(one, other) == {
        "resumed_bit_for_bit": False, "steps_that_differ": 1, "metrics": ["loss"], "files": ["model.safetensors"]
    }  # fmt: skip


def test_stages_have_parts_for_which_their_nine_minutes_suffice():
    for stage in card_stages.STAGES.values():
        names = [part.name for part in stage.parts]
        assert names and len(set(names)) == len(names) and all(part.seconds <= 540 for part in stage.parts)
        for part in stage.parts:
            script = next(word for word in part.command if word.endswith(".py") or "::" in word)
            file, _, test = script.partition("::")
            assert (ROOT / file).is_file() and (not test or hasattr(test_gpu, test))
    assert sum(part.seconds for part in card_stages.STAGES[1].parts) <= 540  # the first stage ends in one call


# --- what the parts measure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS_ON_A_CARD)
def test_by_the_plan_a_run_under_a_cap_fits_it_and_32_gb_of_ram(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit.py", *RUNS_ON_A_CARD[name]])
    flags: Namespace = parse_arguments()
    config = TrainConfig(
        model=flags.model, batch_size=flags.questions, num_generations=flags.generations,
        max_prompt_length=flags.prompt, max_completion_length=flags.completion, lora_r=flags.lora_r,
        gradient_checkpointing=flags.checkpointing == "true", reference=flags.reference,
    )  # fmt: skip
    ds = resolve_ds_config(ROOT / flags.ds, fill=config.ds_sizes(native="bf16"))
    plan = make_plan(shape_of(flags.model), config, ds, device="cuda")
    needs = {kind: max(phase.bytes_in(kind) for phase in plan.phases) / 2**30 for kind in ("gpu", "ram")}
    assert fits(plan, flags.cap_gib, 32), needs
    assert ("no checkpointing" in name) == (flags.checkpointing == "false")


def test_runs_of_the_plan_check_have_checkpointing_on_and_off():
    off = [name for name in RUNS_ON_A_CARD if "no checkpointing" in name]
    assert off and len(off) < len(RUNS_ON_A_CARD)


def without_workspaces(phase: PhasePlan) -> int:
    """Bytes in GPU memory but for what preflight has taken already."""
    return phase.bytes_in("gpu") - sum(phase.gpu[name] for name in ("cuBLAS workspaces", "CUDA graphs"))


def test_the_room_on_a_full_card_lies_between_the_need_of_all_rows_and_of_the_fewest(tiny_folder):
    def update(pack_tokens: int) -> int:
        config = TrainConfig(
            model=str(tiny_folder), gradient_checkpointing=False, pack_tokens=pack_tokens, **test_gpu.MANY_ROWS
        )
        ds = resolve_ds_config(ROOT / "ds_configs/zero2.json", fill=config.ds_sizes(native="bf16"))
        plan = make_plan(shape_of(str(tiny_folder)), config, ds, device="cuda")
        return max(map(without_workspaces, (phase for phase in plan.phases if phase.name in ("update", "reference"))))

    assert 1.4 * update(1000) < test_gpu.ROOM < update(0) / 1.4


def test_the_kernel_of_each_attention_is_noted(tiny_model):
    shape = tiny_model.config.to_dict()
    policy, rows = test_gpu.policy_of(shape, "cpu"), test_gpu.packed_rows(259, "cpu")
    with KernelsChosen() as seen:
        policy(rows)
    assert seen.kernels and "MATH" not in seen.kernels.values()
    with KernelsChosen() as seen, sdpa_kernel([SDPBackend.MATH]):
        policy(rows)
    assert set(seen.kernels.values()) == {"MATH"}


def test_the_gradient_that_is_compared_bit_by_bit_reaches_every_weight(tiny_model):
    policy = test_gpu.policy_of(tiny_model.config.to_dict(), "cpu", checkpointing=True)
    gradients = torch.autograd.grad(policy(test_gpu.packed_rows(259, "cpu")).sum(), list(policy.parameters()))
    assert all(gradient.any() for gradient in gradients)


# --- tables ---------------------------------------------------------------------------------------------------

FIGURES = {
    1: {"steps": 4, "seconds": [9.0, 8.5], "gpu_gib": 0.5, "ram_gib": 0.6, "resumed_bit_for_bit": True},
    2: {"this": {"2 x 4": "FLASH_ATTENTION"}},
    3: {
        "model": "qwen2.5-3b", "ds": "ds_configs/zero2.json", "reference": "int8", "checkpointing": False, "lora_r": 0,
        "cap_gib": 16, "tokens": "2 x 4 x (512 + 300)", "seconds": 60.0,
        "peaks": {"gpu": {"update": [9 * 2**30, 10 * 2**30]}, "ram": {"step": [2 * 2**30, 2 * 2**30]}},
    },
    4: {
        "model": "qwen2.5-1.5b", "rows": "2 x 4 x (512 + 300)", "weights_gb": 3.1, "copy_gb_per_second": 900.0,
        "tokens_per_second": {"kernels": 500.0, "graphs": 1500.0}, "floor_tokens_per_second": 2000.0,
    },
    5: {"rows": [{
        "name": "ours", "tokens": 300, "peak_megabytes": 700.0, "forward_seconds": 0.01, "backward_seconds": 0.02,
        "error": 1e-5, "note": "",
    }]},
    6: {side: [{"sample": s, "reference": s, "update": s, "total": 3 * s, "gpu_gib": 4.0, "ram_gib": 8.0}]
        for side, s in (("ours", 1.0), ("TRL", 2.0))},
}  # fmt: skip
CELLS = {
    1: "| zero2.json, int8 | 4 | 0.50 | 0.60 | 9.0 | 8.5 | yes |",
    2: "| passed | this: {'2 x 4': 'FLASH_ATTENTION'} |",
    3: "| qwen2.5-3b, `zero2.json`, int8, 2 x 4 x (512 + 300) | off | 16 | GPU memory |  |  |  |  | 9.00 / 10.00 ",
    4: "| qwen2.5-1.5b | 2 x 4 x (512 + 300) | 500 (25%) | 1500 (75%) | 2000 | 900 |",
    5: "| 300 | ours | 700 | 0.0100 | 0.0200 | 1.0e-05 |",
    6: "| qwen2.5-0.5b beside TRL | total | 3.00 | 6.00 | 2.00 |",
}


def test_the_documents_get_a_table_of_each_stage_with_card_and_date(tmp_path):
    for document in card_tables.PLACES:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    for stage, figures in FIGURES.items():
        record, (first, second, *_) = (
            Record(tmp_path / f"stage{stage}.jsonl", CARD, "2.13"),
            card_stages.STAGES[stage].parts,
        )
        record.add(first.name, "failed", 1.0, {}, "an older line")
        record.add(first.name, "passed", 10.0, figures)
        Record(record.file, "CPU").add(first.name, "passed", 1.0, figures)
        record.add(second.name, "skipped", why="trl: not installed")
    card_tables.write_docs(tmp_path, root=tmp_path)
    for document, stages in card_tables.PLACES.items():
        text = (tmp_path / document).read_text()
        for stage in stages:
            assert CELLS[stage] in text and f"card.py --stage {stage}`)." in text
        assert "Measured on CPU" not in text  # such a record says nothing about a card
        assert f"**Measured on {CARD}**, {time.strftime('%Y-%m-%d')}" in text and "an older line" not in text
        assert f"{card_stages.STAGES[stages[0]].parts[1].name}: skipped (trl: not installed)" in text
        before = (ROOT / document).read_text().partition("<!-- card: begin -->")[0]
        assert text.startswith(before) and "<!-- card: end -->" in text


def test_without_records_the_documents_stay_as_they_are(tmp_path):
    (tmp_path / "docs").mkdir()
    card_tables.write_docs(tmp_path, root=tmp_path)
    assert not list((tmp_path / "docs").iterdir())


def test_a_line_of_json_is_found_among_other_output():
    from card_parts import figures_of

    assert figures_of('x\n{"a": 1}\n{"b": 2}\n{not json\n') == {"b": 2}
    assert figures_of(json.dumps({"a": {"b": 1}}, indent=2)) == {"a": {"b": 1}}
    assert figures_of("nothing") == {}
