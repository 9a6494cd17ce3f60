"""docs/python.md: its code trains a model."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
SMALL = "num_steps=1, num_generations=2, batch_size=1, max_prompt_length=480, max_completion_length=4, eval_limit=2"


def test_its_code_trains(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    small = code.replace('"qwen2.5-0.5b"', repr(str(tiny_folder))).replace("num_steps=20", SMALL)
    assert small.count(SMALL) == 1
    scope = {}
    exec(small, scope)
    run = scope["run"]
    assert run.folder.parent == tmp_path / "outputs" and len(run.metrics) == 1
    assert capsys.readouterr().out.endswith(f"{run.metrics[-1]['reward']} {run.summary['after']['accuracy']}\n")
