"""examples/t4.ipynb: its cells run one after another in one scope, on a small model with two steps."""

import json
from pathlib import Path

from grpo_ds.commands.settle import settle
from grpo_ds.memory.select import fits
from grpo_ds.models.presets import EMBEDDED

FILE = Path(__file__).resolve().parents[2] / "examples" / "t4.ipynb"
T4 = 15.0, 12.7  # GiB of GPU memory and of RAM, as on a free notebook server
SMALL = {"batch_size": 1, "num_generations": 2, "max_completion_length": 8, "max_prompt_length": 400, "eval_limit": 2}


def cells():
    """(tags, code) of every code cell; the installation is that of these tests."""
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    found = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    codes = [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in found]
    return [(tags, code) for tags, code in codes if "%pip" not in code]


def test_its_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    for tags, code in cells():
        exec(compile(code, str(FILE), "exec"), scope)
        if "parameters" in tags:
            scope |= {"MODEL": EMBEDDED, "STEPS": 2, "SIZES": SMALL}
    run, printed = scope["run"], capsys.readouterr().out
    assert len(run.metrics) == 2 and run.folder.parent == tmp_path / "outputs"
    assert all("rewards/brief/mean" in line for line in run.metrics)
    assert run.verdict.headline in printed


def test_both_of_its_models_fit_a_t4_in_fp16(monkeypatch):
    monkeypatch.setattr("grpo_ds.system.hardware.compute_capability", lambda: (7, 5))
    (parameters,) = (code for tags, code in cells() if "parameters" in tags)
    scope = {}
    exec(parameters, scope)
    sizes = [word for name, value in scope["SIZES"].items() for word in (f"--{name}", str(value))]
    machine = ["--plan", "--gpu_gib", str(T4[0]), "--ram_gib", str(T4[1])]
    for model, rank in ((scope["MODEL"], scope["LORA_R"]), ("qwen2.5-1.5b", 16)):
        assert f'"{model}", {rank}' in parameters
        settled = settle(["--model", model, "--lora_r", str(rank), *sizes, *machine])
        assert fits(settled.plan, *T4) and settled.job.ds.precision == "fp16"
