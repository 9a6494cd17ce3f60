"""A chat is rendered once: what a template prints today is what the model's prompts hold on every later day."""

import json

import pytest

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.models.chat_texts import CHAT_TEXTS_FILE, chat_texts, save_tokenizer
from grpo_ds.models.policy import load_tokenizer
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.training.prompt_style import PromptStyle
from tests.conftest import CHATML, DATED, make_tokenizer, tiny_config

DRAWN = "{{ range(10 ** 5) | random }}\n" + CHATML
ASKED = [Question(str(n), f"Is it {n}?", f"It is {n}.", "yes") for n in range(3)]


def style(**changes):
    settings = {"few_shot": 0, "prefill": False, "max_prompt_length": 1999}
    return PromptStyle(AnswerFormat(), **{**settings, **changes})


def saved(folder, template):
    tiny_config().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def save(tokenizer, folder):
    """Save the tokenizer as a run does, beside the model's config."""
    tiny_config().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def prompts(tokenizer, **changes):
    return [tokenizer.decode(ids) for ids in style(**changes).encode(tokenizer, ASKED)]


def first_line(texts):
    (line,) = {text.splitlines()[0] for text in texts}
    return line


@pytest.mark.parametrize("template", [DATED, DRAWN], ids=["date", "random"])
def test_all_prompts_and_those_of_the_saved_model_hold_the_text_of_the_first(tmp_path, days_pass, template):
    tokenizer = load_tokenizer(str(saved(tmp_path / "model", template)))
    before = prompts(tokenizer)
    first_line(before)  # one date in all of them
    assert style().encode_again(tokenizer, ASKED) == style().encode(tokenizer, ASKED)  # and past midnight
    save(tokenizer, tmp_path / "run")
    assert prompts(load_tokenizer(str(tmp_path / "run"))) == before
    assert prompts(load_tokenizer(str(tmp_path / "model"))) != before  # a new run has its own day


def test_prompts_encoded_again_hold_a_text_that_has_changed(tmp_path):
    tokenizer = load_tokenizer(str(saved(tmp_path / "model", CHATML)))
    before, texts = style().encode(tokenizer, ASKED), chat_texts(tokenizer)
    texts.update({key: f"Shared.{text}" for key, text in texts.items()})  # as another rank rendered it
    assert style().encode(tokenizer, ASKED) == before
    added = tokenizer.encode("Shared.", add_special_tokens=False)
    assert style().encode_again(tokenizer, ASKED) == [[*added, *ids] for ids in before]


def test_the_first_rendering_is_the_templates_own(tmp_path, days_pass):
    line = first_line(prompts(load_tokenizer(str(saved(tmp_path / "model", DATED)))))
    assert line == "Today is 01 March 2026, 23:59."  # the day before, the template was checked


def test_another_prompt_and_an_edited_template_are_rendered_anew(tmp_path, days_pass):
    tokenizer = load_tokenizer(str(saved(tmp_path / "model", DATED)))
    before = first_line(prompts(tokenizer))
    save(tokenizer, tmp_path / "run")
    again = load_tokenizer(str(tmp_path / "run"))
    assert first_line(prompts(again, few_shot=1)) != before
    again.chat_template = CHATML
    style().encode_again(again, ASKED)
    assert first_line(prompts(again)) == "<|im_start|>system"


def test_the_saved_texts_are_of_prompts_and_hold_no_question(tmp_path):
    tokenizer = load_tokenizer(str(saved(tmp_path / "model", CHATML)))
    prompts(tokenizer)
    save(tokenizer, tmp_path / "run")
    texts = json.loads((tmp_path / "run" / CHAT_TEXTS_FILE).read_text())
    assert texts == chat_texts(tokenizer) and all(text.endswith("<|im_start|>assistant\n") for text in texts.values())
    assert "Is it" not in "".join(texts.values())


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_damaged_texts_are_named(tmp_path, content):
    folder = saved(tmp_path / "model", CHATML)
    (folder / CHAT_TEXTS_FILE).write_bytes(content)
    with pytest.raises(UsageError, match=r"chat_texts\.json is damaged") as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value).splitlines()) <= MAX_LINES
