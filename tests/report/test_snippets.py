"""The model outside of this package: the card's code gives the text that `ask` gets, Ollama's file has the prompt."""

import json
import shutil

import pytest

from grpo_ds.commands import ask
from grpo_ds.report.model_card import write_card
from grpo_ds.report.snippets import messages_of, modelfile, transformers_code
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from grpo_ds.task.question import Question
from grpo_ds.training.prompt_style import prompt_style
from tests.report.finished import finished
from tests.tiny import FORM

QUESTION, START = "Does it help?", "It helped 9 of 10 <|im_end|>."
PROMPTS = [
    {},
    {"few_shot": 2, "prefill": True, "subject": "biomedical"},
    {"context_field": "none", "labels": "no,yes"},
    {"answers": "none", "reward_funcs": "format"},
]


@pytest.fixture(scope="module")
def half(formed_folder, tmp_path_factory):
    """The model that answers in form, in the precision in which `ask` computes here, as a run saves it."""
    from transformers import AutoModelForCausalLM

    from grpo_ds.system.hardware import native_precision
    from grpo_ds.training.precision import DTYPES

    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(formed_folder, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(formed_folder, dtype=DTYPES[native_precision(on_gpu=False)])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def context(half, tokenizer):
    """As long as to make a prompt of the length at which the model was taught the form; a byte is a token."""
    style = prompt_style(TrainConfig(model=str(half), **FORM))
    (ids,) = style.encode(tokenizer, [Question("", QUESTION, START, "yes")])
    return START + "!" * (FORM["max_prompt_length"] - len(ids))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_code_of_the_card_prints_the_text_of_ask(half, capsys, context, prompt):
    write_config(TrainConfig(**{**FORM, "max_prompt_length": 1500, **prompt}), half)
    given = [] if "context_field" in prompt else ["--context", context]
    ask.main(["--model", str(half), "--question", QUESTION, *given, "--json"])
    text = json.loads(capsys.readouterr().out)["text"]
    code = transformers_code(half, is_adapter=False).replace("THIS_FOLDER", str(half))
    code = code.replace('question = "..."', f"question = {QUESTION!r}").replace(
        'context = "..."', f"context = {context!r}"
    )
    exec(code, {})
    assert capsys.readouterr().out == f"{text}\n"
    assert prompt or text.endswith("</a>")  # in form, where the prompt is the one that it was taught


def test_the_card_has_the_code_and_the_modelfile(tmp_path):
    folder = finished(tmp_path / "run", few_shot=1, prefill=True)
    card = write_card(folder).read_text()
    assert transformers_code(folder, is_adapter=False) in card and modelfile(folder) in card


def test_a_modelfile_has_system_prompt_examples_lengths_and_stop(tmp_path):
    write_config(TrainConfig(few_shot=1, answer_tag="choice", max_completion_length=50), tmp_path)
    lines = modelfile(tmp_path, "./mine.gguf")
    for part in (
        "FROM ./mine.gguf\n",
        'PARAMETER stop "</choice>"\n',
        "PARAMETER num_predict 50\n",
        'SYSTEM """You answer',
    ):
        assert part in lines
    assert lines.count("\nMESSAGE user") == lines.count("\nMESSAGE assistant") == 1


def test_messages_end_with_the_prefilled_tag(tmp_path):
    write_config(TrainConfig(prefill=True, subject="chess"), tmp_path)
    system, user, begun = messages_of(tmp_path, QUESTION, START)
    assert "You answer chess questions" in system["content"]
    assert user["content"] == f"Context: {START}\n\nQuestion: {QUESTION}"
    assert begun == {"role": "assistant", "content": "<reasoning>"}
