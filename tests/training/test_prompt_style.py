"""A chat template that begins the assistant's turn: what completions are read as, and when it is refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from grpo_ds.commands import ask, evaluate
from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.report.console import Console
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.task.rewards import ready_made
from grpo_ds.task.scoring import score
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.sampling import Completions
from grpo_ds.training.trainer import Trainer
from tests.conftest import CHATML, make_tokenizer

OPENS = CHATML.replace("assistant\n", "assistant\n<think>\n")  # as QwQ
THINK = AnswerFormat(("yes", "no"), reasoning_tag="think")
QUESTION = Question("1", "Did it fall?", "It fell by half.", "yes")


def texts(style, tokenizer, *written):
    rows = [tokenizer.encode(text) for text in written]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return style.texts(tokenizer, Completions(ids, mask, torch.ones(len(rows), dtype=torch.bool)))


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("template", [CHATML, OPENS])
def test_a_right_answer_earns_all_of_its_reward_wherever_the_tag_was_opened(template, prefill):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    style = PromptStyle(THINK, few_shot=2, prefill=prefill, max_prompt_length=4096)
    (prompt,) = style.encode(tokenizer, [QUESTION])
    opened = prefill or template == OPENS
    assert tokenizer.decode(prompt).rpartition("assistant\n")[2].count("<think>") == opened
    right = "It fell.</think><answer>yes</answer>"
    read = texts(style, tokenizer, right if opened else f"<think>{right}", "<think>Again.</think><answer>yes</answer>")
    # After an open tag the same tag again is a second one.
    functions = {name: (function, 1.0) for name, function in ready_made(answer_format=THINK).items()}
    chosen = {name: functions[name] for name in ("correctness", "format")}
    assert score(read, [QUESTION] * 2, functions=chosen).total == [2.4, 0.0 if opened else 2.4]


@pytest.fixture
def no_weights(tiny_folder, tmp_path):
    """A model folder without weights, whose template opens <think>: loading it would fail otherwise."""
    folder = shutil.copytree(tiny_folder, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(OPENS)
    return folder


def train(folder):
    config = TrainConfig(model=str(folder), max_completion_length=8)
    ds = resolve_ds_config("ds_configs/zero2.json", fill=config.ds_sizes(native="fp32"))
    Trainer(config, ds, ranks.start(), Console(speaks=False), {})


COMMANDS = {
    "train": train,
    "eval": lambda folder: evaluate.main(["--model", str(folder), "--data", "sample"]),
    "ask": lambda folder: ask.main(["--model", str(folder), "--question", "Is it?", "--context", "It is."]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_tag_that_the_template_opens_is_named_before_the_model_is_loaded(no_weights, command):
    with pytest.raises(UsageError, match=r"opens <think>.*\n.*\n.*--reasoning_tag think") as error:
        COMMANDS[command](no_weights)
    assert len(str(error.value).splitlines()) <= MAX_LINES


def test_the_warning_of_moved_examples_is_one_line_in_every_command(no_weights, capsys):
    strips = "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"
    (no_weights / "chat_template.jinja").write_text(OPENS.replace("{{ m['content'] }}", strips))
    flags = ["--model", str(no_weights), "--reasoning_tag", "think", "--few_shot", "2"]
    console = Console()
    config = TrainConfig(model=str(no_weights), max_completion_length=8, reasoning_tag="think", few_shot=2)
    ds = resolve_ds_config("ds_configs/zero2.json", fill=config.ds_sizes(native="fp32"))
    for command in (
        lambda: Trainer(config, ds, ranks.start(), console, {}),
        lambda: evaluate.main([*flags, "--data", "sample"]),
        lambda: ask.main([*flags, "--question", "Is it?", "--context", "It is."]),
    ):
        with pytest.raises(UsageError, match="cannot be loaded"):  # the weights are missing
            command()
        said = "".join(capsys.readouterr())
        assert said.count("edits earlier assistant turns: the worked examples are text of the user's turn.\n") == 1


def test_two_styles_of_one_tokenizer_do_not_share_their_opening():
    tokenizer, style = make_tokenizer(), PromptStyle(THINK, few_shot=0, prefill=False, max_prompt_length=4096)
    assert texts(style, tokenizer, "a") == ["a"]
    assert texts(replace(style, prefill=True), tokenizer, "a") == ["<think>a"]
