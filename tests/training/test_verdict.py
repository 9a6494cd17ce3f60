"""A real run that was made to fail in each known way shows that cause; a run that learns shows none.

The model is tests/tiny.py's, taught for some seconds to write the form of an answer at times and the right answers to
200 questions most of the time, so that there is something left to learn.
"""

import json
import random
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.commands.settle import settle
from grpo_ds.commands.train import reward_functions
from grpo_ds.report import verdict
from grpo_ds.report.causes import causes
from grpo_ds.report.console import Console
from grpo_ds.report.evidence import Evidence
from grpo_ds.report.run_files import read_run
from grpo_ds.report.verdict import TASK, judge
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.run import Run
from grpo_ds.training.trainer import Trainer
from tests.report.test_verdict import raised_and_lowered

ROOT = Path(__file__).resolve().parents[2]
FORM = AnswerFormat(("yes", "no"), "r", "a")
SYSTEM = "Say."
RIGHT, FORMED = 0.7, 0.35  # of the texts that the model is taught: right answers, and texts in form
LESSONS, ROWS = 300, 24


def records(count: int, *, clear: bool = True, yes: float = 0.5, seed: int = 0) -> list[dict[str, str]]:
    """Questions whose context says the answer; clear: False: it says nothing."""
    numbers = random.Random(seed).sample(range(10**4), count)
    labels = ["yes" if i < yes * count else "no" for i in range(count)]
    return [
        {"question": f"{number:04}?", "context": label if clear else "-", "ground_truth": label}
        for number, label in zip(numbers, labels, strict=True)
    ]


def write(folder: Path, name: str, made: list[dict[str, str]]) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(made))
    return file


@pytest.fixture(scope="module")
def places(tiny_folder, tmp_path_factory):
    """The taught model, the data and the system prompt."""
    folder = tmp_path_factory.mktemp("verdict")
    (folder / "system.txt").write_text(SYSTEM)
    made = {"system": folder / "system.txt", "raw": tiny_folder, "taught": folder / "taught"}
    made["clear"] = write(folder, "clear", records(200))
    made["blind"] = write(folder, "blind", records(200, clear=False, seed=1))
    made["leaning"] = write(folder, "leaning", records(200, clear=False, yes=0.7, seed=2))
    made["few"] = write(folder, "few", [*records(200)[94:106], *records(24, clear=False, seed=3)])
    (folder / "own.py").write_text("def constant(completions, **_):\n    return [1.0] * len(completions)\n")
    made["constant"] = f"{folder / 'own.py'}:constant"
    teach(tiny_folder, made["taught"], [made["clear"], made["blind"]])
    return made


def teach(base: Path, folder: Path, data: list[Path]) -> None:
    """Train by plain next-token prediction on texts of which some are in form and most of those right."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    questions = [question for file in data for question in read_questions(str(file)).questions]
    prompts = PromptStyle(FORM, 0, False, 200, SYSTEM).encode(tokenizer, questions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(LESSONS):
        rows = [lesson(draw, tokenizer, *draw.choice(list(zip(prompts, questions, strict=True)))) for _ in range(ROWS)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([it + [0] * (longest - len(it)) for it, _ in rows])
        targets = torch.tensor([it + [-100] * (longest - len(it)) for _, it in rows])
        loss = model(input_ids=ids, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lesson(draw, tokenizer, prompt, question):
    """Ids of a prompt with a completion, and the targets: the completion alone."""
    right = draw.random() < (RIGHT if question.context in FORM.labels else 0.5)
    label = question.label if right else {"yes": "no", "no": "yes"}[question.label]
    text = FORM.write("so", label) if draw.random() < FORMED else "no idea"
    said = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + said, [-100] * len(prompt) + said


COMMON = dict(
    reasoning_tag="r", answer_tag="a", max_prompt_length=200, max_completion_length=40, eval_limit=24,
    num_generations=8, batch_size=4, num_steps=8, learning_rate=1e-3, preflight=False, save_steps=0,
)  # fmt: skip


def train(places, folder: Path, *, model: str = "taught", data: str = "clear", native: str = "fp32", **flags) -> Path:
    """Train as `grpo-ds train` does, in this process; return the run's folder.

    native: precision of the weights. Of the data "few" the twelve questions that the model was taught are trained on.
    """
    flags = {**COMMON, **flags}
    config = TrainConfig(model=str(places[model]), data=str(places[data]), system_prompt=str(places["system"]), **flags)
    ds = resolve_ds_config(places.get(config.ds, ROOT / config.ds), fill=config.ds_sizes(native=native))
    found = read_questions(config.data)
    asked, held_out = split_questions(found.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    if data == "few":
        asked, held_out = ([it for it in found.questions if (it.context == "-") is other] for other in (False, True))
    trainer = Trainer(config, ds, ranks.start(), Console(speaks=False), reward_functions(config, found))
    Run(trainer, asked, held_out[: config.eval_limit], folder).run()
    trainer.engine.close()
    return folder


@dataclass(frozen=True)
class Failing:
    """A run that was made to fail: what its verdict must name, and the flags that made it fail."""

    cause: str
    flags: dict[str, object] = field(default_factory=dict)


BLIND = dict(data="blind")  # the context says nothing, so the answer is a coin toss
FAILING = {
    "cut": Failing("completions cut", dict(max_completion_length=4)),
    "no form": Failing("rewards all 0", dict(model="raw")),
    "constant": Failing("rewards all equal", dict(reward_funcs="CONSTANT")),
    "two samples": Failing("groups without a gradient", dict(BLIND, num_generations=2, reward_funcs="correctness")),
    "cold": Failing("entropy gone", dict(temperature=0.02)),
    "bf16": Failing("weights stand still", dict(native="bf16", learning_rate=1e-12)),
    "slow": Failing("KL at its floor", dict(learning_rate=1e-7)),
    "held": Failing("KL at its floor", dict(beta=10.0, learning_rate=5e-5)),
    "fast": Failing("KL ran away", dict(learning_rate=3e-2, beta=1e-4)),
    "fast, no reference": Failing("policy broke down", dict(learning_rate=3e-2, beta=0.0)),
    "many updates": Failing("ratio clipped", dict(BLIND, learning_rate=4e-3, mu=8, beta=0.2, num_steps=6)),
    "mostly yes": Failing("lean to one label", dict(data="leaning", balance_classes=False, num_steps=20)),
    "twelve questions": Failing("data too small", dict(data="few", num_steps=40)),
}


@pytest.fixture(scope="module", params=list(FAILING))
def failed(request, places, tmp_path_factory):
    """A run of FAILING: the cause that it must show, its folder and what its verdict rests on."""
    failing = FAILING[request.param]
    flags = {name: str(places["constant"]) if it == "CONSTANT" else it for name, it in failing.flags.items()}
    folder = train(places, tmp_path_factory.mktemp("failed") / "run", **flags)
    return failing.cause, folder, Evidence.of(read_run(folder))


def test_a_run_that_was_made_to_fail_shows_its_cause(failed):
    cause, _, known = failed
    found = judge(known)
    assert found.headline != TASK and cause in [it.name for it in found.causes]


def test_its_flags_and_the_next_command_are_accepted(failed):
    _, folder, known = failed
    found = judge(known)
    words = shlex.split(found.command("grpo-ds train", str(folder)))[2:]
    assert settle(words).config.num_steps > known.setting("num_steps")
    for flag in (flag for cause in found.causes for flag in cause.flags if "FILE" not in flag):
        settle([*words[:2], *flag.split()])


def test_its_flags_are_not_both_raised_and_lowered(failed):
    assert raised_and_lowered(failed[2]) == []


HEALTHY = {"fp32": dict(num_steps=16), "bf16": dict(native="bf16", num_steps=16), "short": dict(num_steps=6)}


@pytest.fixture(scope="module", params=list(HEALTHY))
def healthy(request, places, tmp_path_factory):
    return train(places, tmp_path_factory.mktemp("healthy") / "run", **HEALTHY[request.param])


def test_a_run_that_learns_shows_no_cause_even_before_it_has_learned(healthy):
    assert causes(Evidence.of(read_run(healthy))) == ()


def test_a_run_that_learned_the_task_says_so_everywhere(places, tmp_path):
    folder = train(places, tmp_path / "run", num_steps=24)
    found = verdict.of(read_run(folder))
    assert found.headline == TASK and found.causes == () and "it learned the form" in found.aspects[0]
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert found.headline in page and found.headline in card and found.outlook in page
