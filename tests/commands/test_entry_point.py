"""`grpo-ds`: entry point of every command; messages name commands as the user typed this one."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.commands import completion
from grpo_ds.commands.main import COMMANDS
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.run_folder.status import resume_command
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_json import read_json
from grpo_ds.settings.shipped import CONFIGS, DS_JSONS, Shipped
from grpo_ds.system.invocation import SCRIPTS, command, typed_here
from tests.conftest import check_example

ROOT = Path(__file__).resolve().parents[2]
# As pip writes an entry point.
CONSOLE_SCRIPT = "import sys\nsys.path.insert(0, {root!r})\nfrom {module} import {name}\nsys.exit({name}())\n"
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy", "matplotlib", "wandb")


@pytest.fixture(scope="module")
def console_script(tmp_path_factory):
    """The console script that setup.cfg defines."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    script = tmp_path_factory.mktemp("bin") / name
    script.write_text(CONSOLE_SCRIPT.format(root=str(ROOT), module=module, name=function))
    return script


@pytest.fixture(scope="module")
def grpo_ds(console_script):
    """Function that runs it in a folder."""

    def run(*words, cwd=ROOT):
        command = [sys.executable, str(console_script), *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_on_a_line(grpo_ds, words):
    result = grpo_ds(*words)
    assert result.returncode == 0 and not result.stderr
    for name, (_, what) in COMMANDS.items():
        assert any(line.split() == [name, *what.split()] for line in result.stdout.splitlines())


def test_every_script_of_launch_is_a_command():
    assert {file.name for file in (ROOT / "launch").glob("*.py")} <= set(SCRIPTS.values())
    assert set(SCRIPTS) == set(COMMANDS) - {"completion"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_how_it_is_used_under_this_name(grpo_ds, name):
    result = grpo_ds(name, "--help")
    assert f"grpo-ds {name} " in result.stdout + result.stderr


def test_the_version_is_the_installed_one(grpo_ds):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert grpo_ds("--version").stdout == f"grpo-ds {setup['metadata']['version']}\n"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evaluate", "eval"), ("asks", "ask")])
def test_a_mistyped_command_names_the_nearest(grpo_ds, typed, meant):
    result = grpo_ds(typed, "--num_steps", 3)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{typed} is not a command; did you mean {meant}?" in result.stderr


def test_errors_of_a_command_keep_their_exit_codes(grpo_ds, tmp_path):
    assert grpo_ds("train", "--num_stepz", 3).returncode == 2
    assert grpo_ds("train", "--model", "smollm2-135m", "--data", tmp_path / "none.json").returncode == 3


@pytest.mark.parametrize("words", [[], ["train", "--help"], ["ask", "--help"], ["completion", "bash"]])
def test_what_needs_no_model_loads_nothing_heavy(words):
    code = (
        "import contextlib, sys; from grpo_ds.commands.main import dispatch\n"
        f"with contextlib.suppress(SystemExit): dispatch({words})\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr == "[]\n"


# Commands in messages.

ENTRY_POINTS = [
    (["/home/me/.venv/bin/grpo-ds", "train"], {}, "grpo-ds train"),
    (["/src/grpo_ds/__main__.py", "train"], {}, "python -m grpo_ds train"),
    (["launch/train.py"], {}, "python launch/train.py"),
    (["launch/train.py", "--local_rank=0"], {}, "deepspeed --num_gpus 2 launch/train.py"),
    (["/src/grpo_ds/__main__.py", "--local_rank=0", "train"], {}, "deepspeed --num_gpus 2 --module grpo_ds train"),
    (
        ["launch/train.py", "--local_rank=0"],
        {"WORLD_SIZE": "1"},
        "deepspeed launch/train.py",
    ),
    (
        ["launch/train.py", "--local_rank=0"],
        {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
        "deepspeed --hostfile HOSTS launch/train.py",
    ),
    (
        ["launch/train.py"],
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        "torchrun --nnodes 2 --nproc_per_node 2 launch/train.py",
    ),
    (["launch/train.py"], {"TORCHELASTIC_RUN_ID": "1"}, "torchrun --nproc_per_node 2 launch/train.py"),
    (
        ["/src/grpo_ds/__main__.py", "train"],
        {"TORCHELASTIC_RUN_ID": "1"},
        "torchrun --nproc_per_node 2 -m grpo_ds train",
    ),
]


@pytest.mark.parametrize(("argv", "environment", "words"), ENTRY_POINTS)
def test_the_command_to_resume_uses_the_same_entry_point(monkeypatch, argv, environment, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*argv, "--num_steps", "3"])
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    anywhere = resume_command(Path("run/checkpoint-2"))
    assert anywhere == f"{words.replace('launch/', f'{ROOT}/launch/')} --resume_from_checkpoint run/checkpoint-2"
    assert typed_here(anywhere) == f"{words} --resume_from_checkpoint run/checkpoint-2"


def test_commands_name_a_script_outside_the_working_folder_by_its_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [os.path.relpath(ROOT / "launch" / "train.py")])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert command("ask") == f"python {ROOT}/launch/ask.py"
    resume = resume_command(Path("/run/checkpoint-2"))
    assert resume == typed_here(resume) == f"python {ROOT}/launch/train.py --resume_from_checkpoint /run/checkpoint-2"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("/bin/grpo-ds", "grpo-ds ask"),
        ("/x/grpo_ds/__main__.py", "python -m grpo_ds ask"),
        ("t.py", "python launch/ask.py"),
    ],
)
def test_other_commands_use_the_same_entry_point(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", [script, "train"])
    assert command("ask") == words


def test_the_command_that_select_advises_is_one_that_grpo_ds_takes(grpo_ds):
    result = grpo_ds("select", "--gpu_gib", 24, "--ram_gib", 32, "--num_generations", 8)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Run: ")]
    assert line.split()[1:3] == ["grpo-ds", "train"]
    assert parse(TrainConfig, line.split()[3:], about="").config().num_generations == 8


def test_the_module_is_the_same_entry_point():
    result = subprocess.run(
        [sys.executable, "-m", "grpo_ds", "--local_rank=0", "train", "--num_stepz", "3"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and "did you mean --num_steps" in result.stderr


def test_the_launcher_takes_the_module_from_any_folder(tiny_folder, tmp_path):
    from grpo_ds.system import ranks  # imports torch; the other tests here do not need it

    flags = {
        "model": tiny_folder, "data": "sample", "output_dir": "run", "num_steps": 1, "num_generations": 2,
        "max_prompt_length": 700, "max_completion_length": 4, "eval_limit": 2, "preflight": "false",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(ranks._free_port()), "--module"]
    result = subprocess.run(
        [*launcher, "grpo_ds", "train", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert f"Ask it: python -m grpo_ds ask --model {tmp_path / 'run'}" in result.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


# The shipped DeepSpeed JSONs and worked configs.


def test_the_shipped_json_is_found_from_every_folder(grpo_ds, tmp_path):
    result = grpo_ds("train", "--model", "smollm2-135m", "--plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Memory plan:" in result.stdout


def test_a_json_in_the_working_folder_wins_over_the_shipped_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = Path("ds_configs/zero2.json")
    assert read_json(name) == json.loads((DS_JSONS.folder / "zero2.json").read_text())
    name.parent.mkdir()
    name.write_text("{}")
    assert read_json(name) == {}


@pytest.mark.parametrize("shipped", [DS_JSONS, CONFIGS], ids=lambda shipped: shipped.name)
def test_a_shipped_file_is_found_with_and_without_its_folder(monkeypatch, tmp_path, shipped):
    monkeypatch.chdir(tmp_path)
    check_example(Shipped)
    assert len(shipped.names()) > 2
    for name in shipped.names():
        assert shipped.find(name) == shipped.find(Path(name).name) == ROOT / name
        Path(Path(name).name).write_text("mine")
        assert shipped.find(Path(name).name).read_text() == "mine"


@pytest.mark.parametrize("flag", [["--config", "smollm2-laptop.yaml"], ["--config=configs/smollm2-laptop.yaml"]])
def test_a_worked_config_is_read_from_every_folder(monkeypatch, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    config = parse(TrainConfig, [*flag, "--num_steps", "3"], about="").config()
    assert (config.model, config.num_steps) == ("smollm2-135m", 3)


def test_a_config_that_does_not_exist_gets_the_shipped_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"does not exist\. Shipped: .*configs/smollm2-laptop\.yaml"):
        parse(TrainConfig, ["--config", "other/smollm2-laptop.yaml"], about="")


@pytest.mark.parametrize("name", ["none.json", "ds_configs/none.json", "other/ds_configs/zero2.json"])
def test_what_is_not_shipped_is_not_found(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"does not exist\. Shipped: ds_configs/zero2\.json"):
        read_json(Path(name))


# Completion at TAB.

COMPLETED = [
    ("grpo-ds tra", "train"),
    ("grpo-ds train --num_g", "--num_generations"),
    ("grpo-ds train --plan --num_it", "--num_iterations"),  # a switch needs no value
    ("grpo-ds train --plan ", "true false"),
    ("grpo-ds train --loss_type d", "dapo dr_grpo"),
    ("grpo-ds profile --model qwen2.5-3", "qwen2.5-3b"),
    ("grpo-ds train --ds ds_configs/zero2_l", "ds_configs/zero2_lowram.json ds_configs/zero2_lowram7.json"),
    ("grpo-ds ask --fi", "--file"),
    ("grpo-ds ask --num_g", ""),  # a flag of training
    ("grpo-ds train --config conf", ""),  # nothing of ours: bash completes files
    ("grpo-ds completion ", "bash zsh"),
    ("grpo-ds nonsense --num", ""),
]


@pytest.fixture(scope="module")
def script(grpo_ds):
    return grpo_ds("completion", "bash").stdout


def complete(script: str, line: str) -> str:
    """Return what a real bash completes after this line."""
    ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _grpo_ds; echo "${COMPREPLY[*]}"'
    words = ["bash", "--norc", "-c", f"set -u\n{script}\n{ask}", "bash", *line.split(" ")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(("line", "words"), COMPLETED)
def test_bash_completes_commands_flags_and_choices(script, line, words):
    assert complete(script, line) == words


@pytest.mark.parametrize("name", completion.CONFIGS)
def test_every_flag_of_help_is_completed(grpo_ds, script, name):
    flags = set(re.findall(r"^  (--\w+)", grpo_ds(name, "--help").stdout, re.M))
    assert len(flags) > 10 and flags <= set(complete(script, f"grpo-ds {name} --").split())


def test_zsh_takes_the_same_script_as_bash(grpo_ds, script):
    beginning, same, rest = grpo_ds("completion", "zsh").stdout.partition(script)
    assert "bashcompinit" in beginning and same and not rest


def test_an_unknown_shell_gets_the_names_of_the_two(grpo_ds):
    result = grpo_ds("completion", "fish")
    assert result.returncode == 2 and "completion bash or zsh" in result.stderr
    assert len(result.stderr.splitlines()) <= MAX_LINES
