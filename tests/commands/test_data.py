"""`grpo-ds data FILE` says what a run would read, and shows the prompts that it would ask."""

import json
import re

import pytest

from grpo_ds.commands import data as command
from grpo_ds.commands.data import Measured, chosen, length_lines
from grpo_ds.errors import DataError
from grpo_ds.task.prompts import EncodedPrompt
from grpo_ds.task.questions import Question
from tests.task.test_record_shapes import WORD_PROBLEMS


@pytest.fixture
def shown(tiny_folder, capsys):
    """Function that runs the command with the tiny model's tokenizer and returns its output."""

    def run(*words):
        command.main([*map(str, words), "--model", str(tiny_folder)])
        return capsys.readouterr().out

    return run


def records(folder, contexts):
    """A file of yes and no questions in turn, with these contexts."""
    path = folder / "data.json"
    path.write_text(
        json.dumps([
            {"id": n, "question": f"Is it {n}?", "context": context, "ground_truth": ("yes", "no")[n % 2], "year": n}
            for n, context in enumerate(contexts)
        ])
    )  # fmt: skip
    return path


def test_labels_are_counted_and_three_prompts_are_shown_as_the_model_gets_them(shown, tmp_path):
    said = shown(records(tmp_path, ["It is.", "It was.", "It will be for many years."]))
    assert "data.json: 3 questions (2 yes, 1 no)" in said
    assert "Read as: a JSON list; question 'question', context 'context', answer 'ground_truth'" in said
    assert "Answers: yes 2 (67%), no 1 (33%); always yes is right in 67%" in said
    assert "Columns for reward functions: id, question, context, ground_truth, year" in said
    assert "Cut: nothing (--max_prompt_length 768)" in said
    assert re.findall(r"^--- (\w+), question (\d), \d+ tokens; right answer: (\w+)$", said, re.M) == [
        ("shortest", "0", "yes"),
        ("middle", "1", "no"),
        ("longest", "2", "yes"),
    ]
    assert "It will be for many years." in said.rpartition("---")[2] and "<|im_start|>" in said


def test_what_a_long_context_would_lose_is_counted(shown, tmp_path):
    said = shown(records(tmp_path, ["It is.", "word " * 3000]), "--max_prompt_length", 500)
    longest = int(re.search(r"Lengths with instructions: \d+ to (\d+) tokens", said)[1])
    cut = f"Cut: 1 of 2 contexts lose their beginning (--max_prompt_length 500), the longest {longest - 500} tokens"
    assert f"{cut} (question 1); {longest} would cut none" in said
    assert "Cut: nothing" in shown(tmp_path / "data.json", "--max_prompt_length", longest)


def test_a_question_that_is_too_long_is_named(shown, tmp_path):
    said = shown(records(tmp_path, ["It is."]), "--max_prompt_length", 5)
    assert re.search(r"Too long: 1 of 1; `train` refuses them\. Question 0 needs \d+ tokens", said)


def test_numbers_and_prompts_alone_are_described_by_their_kind(shown, tmp_path):
    said = shown(WORD_PROBLEMS, "--answers", "number")
    assert "word_problems.jsonl: 68 questions (answers are numbers)" in said
    assert "Read as: JSON Lines; question 'question', answer 'answer'" in said
    assert re.search(r"^Answers: \d+ different numbers, from -2 to 17640$", said, re.M)
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,topic\nWrite a haiku.,sea\nWrite a limerick.,hill\n")
    said = shown(path, "--answers", "none")
    assert (
        "Answers: none; the reward functions decide" in said and "Read as: CSV with commas; question 'prompt'" in said
    )


def test_bad_data_ends_the_command_before_a_tokenizer_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "loaded", lambda config: pytest.fail("loaded"))
    path = tmp_path / "data.csv"
    path.write_text("question;answer\nIs it?;ja\nWas it?;nein\n")
    with pytest.raises(DataError, match=r"Answers found: 1 'ja', 1 'nein'; try --labels ja,nein"):
        command.main([str(path), "--model", "smollm2-135m"])


def test_of_few_prompts_each_is_shown_once():
    prompts = [Measured(Question(str(n), "?", "", ""), EncodedPrompt([0] * n, 0)) for n in (3, 1, 2)]
    assert [(len(it.prompt.ids), which) for it, which in chosen(prompts[:1])] == [(3, "longest")]
    assert [(len(it.prompt.ids), which) for it, which in chosen(prompts[:2])] == [(1, "shortest"), (3, "longest")]
    assert [len(it.prompt.ids) for it, _ in chosen(prompts)] == [1, 2, 3] and chosen([]) == []
    assert length_lines(prompts, 8)[0] == "Lengths with instructions: 1 to 3 tokens, median 2"
