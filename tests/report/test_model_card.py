"""The model card: what people and the hub read in it, and that no text in it is interpreted."""

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from grpo_ds.report.markdown import fenced, plain, table
from grpo_ds.report.model_card import write_card
from grpo_ds.run_folder.files import METRICS_FILE
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.prompts import default_system_prompt
from tests.report.finished import finished


class Html(HTMLParser):
    """The tags, and the rows of tables with the texts of their cells."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags, self.rows, self._cell = set(), [], False
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def rendered(folder):
    """Return the body of the card as a browser shows it."""
    return Html(write_card(folder).read_text().split("---\n", 2)[2])


def test_it_stands_beside_what_training_changed(tmp_path):
    # Labels yes no yes no yes no; before yes - no yes yes no (0, 4 and 5 right), after yes no no yes yes yes (0, 1, 4).
    card = rendered(finished(tmp_path / "run"))
    rows = {row[0]: row[1:] for row in card.rows}
    assert rows["accuracy"] == ["50.0%", "50.0%"] and rows["well-formed"] == ["83.3%", "100.0%"]
    assert rows["recall yes"] == ["66.7%", "66.7%"] and rows["recall no"] == ["33.3%", "33.3%"]
    assert rows["phase"] == ["RAM", "RAM planned"] and rows["update"] == ["5.00", "4.00"]
    assert rows["trained on"] == ["questions drawn from 40"] and rows["source"] == ["quiz.json"]
    assert rows["loss_type"] == ["grpo"] and "lora_r" not in rows
    text = (tmp_path / "run" / "README.md").read_text()
    assert "the 50.0% of always giving the most common label" in text and "could be chance" not in text


def test_the_card_of_few_steps_says_so_before_the_causes(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / METRICS_FILE).write_text('{"step": 1, "entropy": 0.001, "weights_moved": 0.01}\n')
    text = write_card(folder).read_text()
    assert text.index("Too few steps to judge by (1)") < text.index("Why not more") < text.index("The entropy is gone")


@pytest.mark.parametrize(("subject", "warns"), [("biomedical", True), ("", False), ("chess", False)])
def test_it_warns_of_medical_use_if_the_questions_are_biomedical(tmp_path, subject, warns):
    text = write_card(finished(tmp_path / "run", subject=subject)).read_text()
    assert ("Not medical advice" in text) == ("no diagnosis" in text) == warns
    assert (f"You answer {subject} questions".replace("  ", " ")) in text


@pytest.mark.parametrize(("after", "warned"), [(["yes"] * 6, True), (["yes", "no"] * 3, False)])
def test_a_model_that_always_says_the_same_is_warned_of(tmp_path, after, warned):
    folder = finished(tmp_path / "run", answers={"before": ["no", "yes"] * 3, "after": after})
    assert ("Nearly all answers are one class" in write_card(folder).read_text()) == warned


def test_the_hub_reads_base_data_and_scores(tmp_path):
    data = ModelCard.load(write_card(finished(tmp_path / "run", data="qiaojin/PubMedQA"))).data
    assert (data.base_model, data.library_name, data.datasets) == (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "transformers",
        ["qiaojin/PubMedQA"],
    )
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"accuracy": 0.5, "f1": 0.4857}
    assert "grpo" in data.tags and data.pipeline_tag == "text-generation"


def test_a_merged_model_has_a_card_of_its_own(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "merged").mkdir()
    of_adapter, of_merged = write_card(folder).read_text(), (folder / "merged" / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in of_adapter and "AutoPeftModelForCausalLM" not in of_merged
    assert "library_name: transformers" in of_merged and "above this one, `held_out.json`" in of_merged


def test_an_adapter_is_one_for_the_hub_and_for_who_asks_it(tmp_path):
    folder = finished(tmp_path / "run", lora_r=8)
    (folder / "adapter_config.json").write_text("{}")
    card = ModelCard.load(write_card(folder))
    assert card.data.library_name == "peft" and "AutoPeftModelForCausalLM.from_pretrained" in card.text
    assert {"lora_r", "lora_alpha"} <= {row[0] for row in rendered(folder).rows}


@pytest.mark.parametrize("flags", [{}, {"labels": 'A"{},"B\\', "reasoning_tag": "think", "context_field": "none"}])
def test_its_code_puts_the_system_prompt_of_training(tmp_path, flags):
    folder = finished(tmp_path / "run", **flags, answers={"before": [None] * 6, "after": [None] * 6})
    (code,) = re.findall("```python\n(.*?)\n```", write_card(folder).read_text(), re.DOTALL)
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    config = yaml.safe_load((folder / "grpo_config.yaml").read_text())
    form = AnswerFormat(tuple(config["labels"].split(",")), config["reasoning_tag"])
    assert default_system_prompt(form, "context_field" not in flags) in strings


def test_no_folder_of_this_machine_is_named(tmp_path):
    secret = tmp_path / "secret" / "place"
    flags = {name: f"{secret}/{name}" for name in ("model", "data", "ds")}
    text = write_card(
        finished(tmp_path / "run", **flags, reward_funcs=f"correctness,{secret}/mine.py:mine")
    ).read_text()
    assert "secret" not in text and str(tmp_path) not in text and "mine.py:mine" in text
    assert "base_model:" not in text  # nobody else could find it


NASTY = [
    *('quo"te', "apo'strophe", "a | b", "line\nbreak", "---", "<script>alert(1)</script>", "![x](http://e.org/x.png)"),
    *(
        "[x](javascript:alert(1))",
        "`code`",
        "```",
        "*bold* _it_ __b__",
        "# head",
        "&lt;b&gt;",
        "key: value",
        "{{ 7*7 }}",
    ),
    *("{% raw %}", "\x1b[31mred", "\u202eevil", "$x^2$", "~~gone~~", "\\|", "- item", "!!python/object:os.system"),
]


@pytest.mark.parametrize("text", NASTY)
def test_a_nasty_name_is_text_in_header_tables_and_prose(tmp_path, text):
    folder = finished(tmp_path / "run")
    config = yaml.safe_load((folder / "grpo_config.yaml").read_text())
    config |= {"model": text, "data": text, "reference": text}
    (folder / "grpo_config.yaml").write_text(yaml.safe_dump(config))
    plain_card = rendered(finished(tmp_path / "other"))
    card, written = rendered(folder), (folder / "README.md").read_text()
    header = yaml.safe_load(written.split("---\n", 2)[1])
    assert header["model-index"][0]["results"][0]["dataset"]["name"] == text.rpartition("/")[2]
    assert card.tags == plain_card.tags and [len(row) for row in card.rows] == [len(row) for row in plain_card.rows]
    (shown,) = [row[1] for row in card.rows if row[0] == "reference"]
    assert shown == " ".join(text.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").split())


@pytest.mark.parametrize("text", ["``` \nrest", "````", "plain"])
def test_a_block_of_code_holds_any_text(text):
    assert MarkdownIt().parse(fenced(text))[0].content == f"{text.rstrip()}\n"


def test_a_cell_is_one_line_and_a_number_short():
    assert table(("a",), [("x\n\ny",), (0.123456,), (None,)]).splitlines()[2:] == ["| x y |", "| 0.1235 |", "|  |"]
    assert plain("q_proj,v_proj") == "q_proj,v_proj"


def test_it_is_made_without_torch():
    code = "import sys, grpo_ds.report.model_card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
