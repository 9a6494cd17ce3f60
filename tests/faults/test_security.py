"""Security of a run, whatever input it gets: no foreign code, no leaked secrets, no network, no commands from text."""

import ast
import configparser
import inspect
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import transformers
from rich.console import Console as RichConsole
from safetensors.torch import load_file

from grpo_ds.commands import ask
from grpo_ds.commands.settle import settle
from grpo_ds.commands.train import output_folder
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.memory.phases import Span
from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.report.console import Console
from grpo_ds.report.memory_measured import draw_timeline
from grpo_ds.run_folder.lock import release
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.settings.saved_config import CONFIG_FILE, prompt_recipe
from grpo_ds.system import hardware
from grpo_ds.system.hardware import check_torch
from grpo_ds.system.script import run_script
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.grading import Evaluation, grade
from grpo_ds.task.questions import Question
from grpo_ds.terminal import escape_control_chars
from grpo_ds.training import evaluate

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = [
    *("--data", "sample", "--num_steps", "1", "--num_generations", "2", "--max_prompt_length", "700"),
    *("--max_completion_length", "4", "--eval_limit", "2"),
]


def run(*words, env=None, launcher=(sys.executable,), script="train.py"):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | (env or {})
    command = [*map(str, launcher), f"launch/{script}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def refused(result, *words):
    message = result.stderr.strip()
    assert result.returncode == 2, result.stdout + message
    assert "Traceback" not in message and len(message.splitlines()) <= MAX_LINES, message
    assert [word for word in words if word not in message] == [], message


# Nothing leaves the machine.


def test_a_run_asks_for_no_address_outside_this_machine(tiny_folder, tmp_path, tried):
    """Watched below Python, with the hub not switched off: an attempt is recorded even if the run survives it."""
    guard, attempts = tmp_path / "guard.so", tmp_path / "attempts"
    source = Path(__file__).with_name("no_network.cpp")
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(guard), "-ldl"], check=True)
    guarded = {"LD_PRELOAD": str(guard), "NETWORK_ATTEMPTS": str(attempts)}
    asks = "import urllib.request; urllib.request.urlopen('https://huggingface.co', timeout=5)"
    caught = subprocess.run([sys.executable, "-c", asks], env={**os.environ, **guarded}, capture_output=True)
    assert caught.returncode != 0 and attempts.read_text() == "look up huggingface.co\n"
    attempts.unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one: parallel runs may use the launcher's default
    launcher = (Path(sys.executable).with_name("deepspeed"), "--master_port", port)
    done = run("--model", tiny_folder, *SMALLEST, "--output_dir", tmp_path / "run", env=guarded, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not attempts.exists(), attempts.read_text()
    assert (tmp_path / "run" / "model.safetensors").is_file()
    tried("runs without a network", "finished, no attempt to leave")


def test_no_service_is_asked_to_convert_a_model():
    """transformers does it in a thread for a hub model without safetensors; this variable switches it off."""
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
    assert '"DISABLE_SAFETENSORS_CONVERSION"' in inspect.getsource(transformers.modeling_utils)


@pytest.mark.parametrize("monitor", ["wandb", "comet"])
def test_deepspeeds_own_monitors_send_nothing_away(tmp_path, monitor):
    content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**content, monitor: {"enabled": True}}))
    with pytest.raises(UsageError, match=f"(?s){monitor}.enabled.*--report_to"):
        resolve_ds_config(tmp_path / "ds.json", fill=TrainConfig().ds_sizes(native="fp32"))


# Secrets.

SECRETS = {
    name: f"planted-{number}-{'5ec2e7' * 6}"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "OPENAI_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "COMET_API_KEY",
            "MY_PASSWORD",
        )
    )
} | {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}  # wandb checks its form


def test_no_secret_of_the_environment_is_written_or_printed(tiny_folder, tmp_path, tried):
    env = SECRETS | {"WANDB_MODE": "offline"}
    flags = ["--output_dir", tmp_path / "run", "--report_to", "wandb,tensorboard", "--log_completions"]
    done = run("--model", tiny_folder, *SMALLEST, *flags, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {".yaml", ".jsonl", ".json", ".safetensors", ".svg", ".wandb", ".md"} <= {file.suffix for file in files}
    assert any("tfevents" in file.name for file in files)
    texts = [done.stdout.encode(), done.stderr.encode(), *(file.read_bytes() for file in files)]
    for name, secret in SECRETS.items():
        assert not any(secret.encode() in text for text in texts), name
        tried("secrets in the environment", "in no file and no line of the run")


@pytest.mark.parametrize(
    "words",
    [
        ["--wandb_api_key", "abc123xyz"],
        ["--wandb-api-key=abc123xyz"],
        ["--api_key=abc123xyz"],
        ["--apikey", "abc123xyz"],
        ["WANDB_API_KEY=abc123xyz"],
        ["HF_TOKEN=abc123xyz"],
        ["--hf_token", "abc123xyz"],
        ["--token", "abc123xyz"],
        ["--hub_token=abc123xyz", "--num_steps", "3"],
        ["--key=abc123xyz"],
        ["--client_secret", "abc123xyz"],
        ["--password", "abc123xyz"],
    ],
)
def test_a_key_among_the_arguments_is_refused_and_not_repeated(words, tried):
    with pytest.raises(UsageError) as caught:
        parse(TrainConfig, words, about="")
    assert "abc123xyz" not in str(caught.value)
    assert words[0].split("=")[0] in str(caught.value) and "WANDB_API_KEY" in str(caught.value)
    tried("keys among the arguments", "refused and not repeated")


def test_a_key_in_a_settings_file_is_not_repeated(tmp_path, tried):
    for number, text in enumerate(("wandb_api_key: abc123xyz\n", "env: {WANDB_API_KEY: abc123xyz}\n")):
        (tmp_path / f"{number}.yaml").write_text(text)
        with pytest.raises(UsageError) as caught:
            parse(TrainConfig, ["--config", str(tmp_path / f"{number}.yaml")], about="")
        assert "abc123xyz" not in str(caught.value)
        tried("keys in a settings file", "refused and not repeated")


def test_flags_that_only_sound_like_keys_are_flags():
    assert parse(TrainConfig, ["--pack_tokens=2000", "--label_field", "key"], about="").config().pack_tokens == 2000
    with pytest.raises(UsageError, match="did you mean --pack_tokens"):
        parse(TrainConfig, ["--pack_token", "2000"], about="")


# Foreign code.

FOREIGN_CONFIG = """
from pathlib import Path
from transformers import Qwen2Config

Path({marker!r}).write_text("ran")

class ForeignConfig(Qwen2Config):
    model_type = "foreign"
"""
FOREIGN_MODEL = """
from transformers import Qwen2ForCausalLM
from .configuration_foreign import ForeignConfig

class ForeignModel(Qwen2ForCausalLM):
    config_class = ForeignConfig
"""


@pytest.fixture
def foreign(tiny_folder, tmp_path):
    """A model with its own Python classes, and the file that they write when they run."""
    folder, marker = tmp_path / "foreign", tmp_path / "ran"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "configuration_foreign.ForeignConfig",
        "AutoModelForCausalLM": "modeling_foreign.ForeignModel",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": names}))
    (folder / "configuration_foreign.py").write_text(FOREIGN_CONFIG.format(marker=str(marker)))
    (folder / "modeling_foreign.py").write_text(FOREIGN_MODEL)
    return folder, marker


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", ["--plan"]),
        ("train.py", []),
        ("select_model.py", ["--gpu_gib", "16", "--ram_gib", "32"]),
        ("ask.py", ["--question", "Did it fall?", "--context", "It fell."]),
        ("evaluate_model.py", ["--data", "sample"]),
    ],
)
def test_a_models_own_code_is_refused_unrun(foreign, tmp_path, script, flags, tried):
    folder, marker = foreign
    # A folder cannot allow its own code.
    (folder / CONFIG_FILE).write_text("trust_remote_code: true\n")
    result = run("--model", folder, *flags, script=script, env={"HF_HOME": str(tmp_path / "hub")})
    refused(result, str(folder), "brings its own Python code", "--trust_remote_code")
    assert not marker.exists()
    tried("models that bring code", "refused, the code not run")


def test_a_tokenizers_own_code_is_refused_unrun(tiny_folder, tmp_path, tried):
    marker = tmp_path / "ran"
    (tmp_path / "tokenization_foreign.py").write_text(f"open({str(marker)!r}, 'w')\nclass ForeignTokenizer: ...")
    for file in tiny_folder.glob("tokenizer*"):  # without config.json no other tokenizer can replace it
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    mapped = {"AutoTokenizer": [None, "tokenization_foreign.ForeignTokenizer"]}
    settings |= {"auto_map": mapped, "tokenizer_class": "ForeignTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="brings its own Python code"):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()
    tried("models that bring code", "refused, the code not run")


def test_a_models_own_code_trains_where_it_is_trusted(foreign, tmp_path, tried):
    folder, marker = foreign
    flags = ["--model", folder, *SMALLEST, "--output_dir", tmp_path / "run", "--trust_remote_code"]
    done = run(*flags, env={"HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr[-2000:]
    assert marker.exists() and "step 1/1" in done.stdout and "Reference: int8" in done.stdout
    tried("models that bring code", "trained with --trust_remote_code")


class RunsWhenUnpickled:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_run_code_are_refused_unrun(tiny_folder, tmp_path, zipped, tried):
    marker, weights = tmp_path / "ran", load_file(tiny_folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    evil = {**weights, "model.norm.weight": RunsWhenUnpickled(marker)}
    torch.save(evil, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="contains more than weights"):
        load_policy(str(tmp_path), dtype=torch.float32, checkpointing=False)
    assert not marker.exists()
    pickle.loads(pickle.dumps(RunsWhenUnpickled(marker)))
    assert marker.exists()  # without the check it would have run
    tried("pickles in place of weights", "refused, not run")


def test_plain_weights_are_read_from_an_old_file_too(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    weights = load_file(tiny_folder / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_policy(str(tmp_path), dtype=torch.float32, checkpointing=False)
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])


def test_damaged_weights_are_named(tiny_folder, tmp_path, tried):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_policy(str(tmp_path), dtype=torch.float32, checkpointing=False)
    tried("damaged weights", "named")


EVIL_YAML = "few_shot: !!python/object/apply:builtins.open ['{marker}', 'w']\n"


def test_yaml_runs_nothing(tmp_path, tried):
    marker, file = tmp_path / "ran", tmp_path / CONFIG_FILE
    file.write_text(EVIL_YAML.format(marker=marker))
    for read in (lambda: prompt_recipe(tmp_path), lambda: parse(TrainConfig, ["--config", str(file)], about="")):
        with pytest.raises(UsageError) as caught:
            read()
        assert len(str(caught.value).splitlines()) <= MAX_LINES
        tried("code in a settings file", "refused, not run")
    for text, words in (
        ("- a list\n", "holds no settings"),
        ("few_shot: abc\n", "few_shot is 'abc'"),
        ("", "no settings"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            prompt_recipe(tmp_path)
    assert not marker.exists()


SOURCES = [*(ROOT / "grpo_ds").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
AUTO = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")


def calls():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file.name, ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def test_the_code_itself_calls_nothing_that_runs_what_it_reads():
    never = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
        "os.system",
        "marshal.loads",
    }
    found = [
        f"{file}: {name}"
        for file, name, options in calls()
        if name in never
        or (name == "torch.load" and ast.unparse(options.get("weights_only", ast.Constant(None))) != "True")
        or "shell" in options
    ]
    assert found == []


def test_every_call_that_opens_a_model_says_whether_its_code_is_trusted():
    opened = [
        (file, "trust_remote_code" in options)
        for file, name, options in calls()
        if name in {f"{auto}.{verb}" for auto in AUTO for verb in ("from_pretrained", "from_config")}
    ]
    assert len(opened) >= 5 and all(stated for _, stated in opened), opened


# Text is text.

NASTY = [
    *("[red]x[/red]", "[/]", "[bold", "[link=https://example.org]x[/link]", ":warning:", "<script>alert(1)</script>"),
    *("\x1b[31mred", "\x1b]0;a title\x07", "\x1b]8;;https://example.org\x1b\\x\x1b]8;;\x1b\\", "\x9b2J"),
    *("\x1bc", "a\rb", "a\x08\x08b", "\x00", "\x07", "\u202eevil\u202c", "\u2066a\u2069", "\ud800", "\x0e"),
    "\x1b[2J\x1b[1;1H",
]  # fmt: skip
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def console():
    """A console that believes it writes to a colour terminal, and its output."""
    made, written = Console(), io.StringIO()
    made._rich = RichConsole(file=written, force_terminal=True, highlight=False, soft_wrap=True, width=160)
    return made, written


@pytest.mark.parametrize("text", NASTY)
def test_a_nasty_text_is_printed_as_text(text, capsys, monkeypatch, tried):
    made, written = console()
    made.line(f"Model: {text}!")
    assert written.getvalue() == f"Model: {escape_control_chars(text)}!\n"

    def fail(argv):
        raise UsageError(f"There is no model {text}!")

    with pytest.raises(SystemExit):
        run_script(fail)
    answer = f"<reasoning>{text}</reasoning><answer>{text}</answer>"
    completions = SimpleNamespace(ended=torch.tensor([True]))
    sampler, style = lambda *_, **__: completions, SimpleNamespace(answer_format=AnswerFormat())
    sampler.__dict__["tokenizer"] = None
    style.encode, style.texts = lambda *_: None, lambda *_: [answer]
    monkeypatch.setattr(evaluate, "load_for_asking", lambda *_, **__: (sampler, style))
    ask.main(["--model", "nowhere", "--question", "Did it fall?", "--context", "It fell."])
    printed = capsys.readouterr()
    assert escape_control_chars(text) in printed.err and escape_control_chars(text) in printed.out
    assert not CONTROL_CHARS.search(written.getvalue() + printed.err + printed.out)
    tried("nasty texts", "printed as text")


@pytest.mark.parametrize("label", ["[/]", "[red]", "\x1b[31m", "\u202eon"])
def test_a_label_is_text_in_the_table_too(label, tried):
    made, written = console()
    questions = [Question(id="1", text="Q?", context="C.", label=label)]
    grades = grade([label], questions, labels=(label, "b"))
    result = Evaluation(texts=[""], answers=[label], grades=grades, right=[True])
    made.before_and_after(result, result, questions)
    assert f"recall {escape_control_chars(label)}" in written.getvalue()
    tried("nasty texts", "printed as text")


@pytest.mark.parametrize("script", ["train.py", "select_model.py"])
def test_a_models_name_is_text_in_a_plan(tiny_folder, tmp_path, script, tried):
    name = "[red]x[bold]y[\x1b[31m"
    (tmp_path / name).symlink_to(tiny_folder)
    done = run("--model", tmp_path / name, *(["--plan"] if script == "train.py" else []), script=script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert escape_control_chars(name) in done.stdout and not CONTROL_CHARS.search(done.stdout)
    tried("nasty texts", "printed as text")


def test_a_drawing_holds_no_element_of_a_text(tmp_path):
    rest = {"ram_end": 0, "pinned": 0, "gpu_reserved": 0}
    span = Span(phase="<script>alert(1)</script> $x$ &amp;", start=0.0, seconds=1.0, gpu_peak=0, ram_peak=2**30, **rest)
    draw_timeline([span], None, tmp_path / "memory.svg")
    assert "<script" not in (tmp_path / "memory.svg").read_text()
    ElementTree.parse(tmp_path / "memory.svg")


# Files stay where they belong.


@pytest.mark.parametrize(
    "model", ["../../x", "/etc/passwd", "..", ".", "/", "a/../../b", "org/model", "x/..", "~/x", ""]
)
def test_a_models_name_makes_one_folder_below_outputs(model, tried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = output_folder(TrainConfig(model=model))
    release()
    assert folder.parent == tmp_path / "outputs" and ".." not in folder.parts
    tried("names of models", "one folder below outputs")


def test_the_folder_of_a_run_may_be_a_link_to_an_empty_one_and_no_other(tmp_path, tried):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    for name in ("empty", "full", "nowhere", "full/precious"):
        (tmp_path / f"to-{Path(name).name}").symlink_to(tmp_path / name)
    config = TrainConfig(output_dir=str(tmp_path / "to-empty"))
    assert output_folder(config) == tmp_path / "to-empty"
    release()
    for name in ("to-full", "to-nowhere", "to-precious"):
        with pytest.raises(UsageError, match="--output_dir"):
            output_folder(replace(config, output_dir=str(tmp_path / name)))
        tried("links for an output folder", "refused before the run")


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b"])
def test_a_chat_templates_name_is_no_path(tiny_folder, tmp_path, name, tried):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "x"}, {"name": name, "template": "evil"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="names a chat template"):
        load_tokenizer(str(tmp_path))
    tried("paths for a template's name", "refused before the run")


# The torch that reads weights.


@pytest.mark.parametrize(
    ("installed", "good"), [("2.9.1", False), ("2.10.0+cu128", True), ("2.13.0", True), ("3.0", True)]
)
def test_a_torch_whose_weights_only_has_holes_is_refused(monkeypatch, installed, good):
    monkeypatch.setattr(hardware, "version", lambda name: installed)
    if good:
        assert check_torch() is None
    else:
        for begin in (check_torch, lambda: settle([]), lambda: ask.main([])):
            with pytest.raises(UsageError, match=r"torch 2\.9\.1 is installed(?s:.*)torch>=2\.10"):
                begin()


def test_the_installation_asks_for_that_torch():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "torch>={}.{}".format(*hardware.OLDEST_TORCH) in setup["options"]["install_requires"].split()
    (pinned,) = re.findall(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tuple(map(int, pinned)) >= hardware.OLDEST_TORCH
