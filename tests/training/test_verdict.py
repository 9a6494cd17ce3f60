"""A real run that was made to fail in each known way shows that cause; a run that learns shows none.

The model is tests/tiny.py's, taught for some seconds to write the form of an answer at times, so that there is
something left to learn: the form, and an answer that stands in the context.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.commands.train import reward_functions
from grpo_ds.report.console import Console
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.system import ranks
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.run import Run
from grpo_ds.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
FORM = AnswerFormat(("yes", "no"), "r", "a")
SYSTEM = "Say."
RIGHT, FORMED = 0.7, 0.35  # of the texts that the model is taught: right answers, and texts in form
LESSONS, ROWS = 400, 24


def records(count: int, *, clear: bool = True, yes: float = 0.5, seed: int = 0) -> list[dict[str, str]]:
    """Questions whose context says the answer; clear: False: it says nothing."""
    numbers = random.Random(seed).sample(range(10**4), count)
    labels = ["yes" if i < yes * count else "no" for i in range(count)]
    return [
        {"question": f"{number:04}?", "context": label if clear else "-", "ground_truth": label}
        for number, label in zip(numbers, labels, strict=True)
    ]


def write(folder: Path, name: str, **how: object) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(records(**how)))
    return file


@pytest.fixture(scope="module")
def places(tiny_folder, tmp_path_factory):
    """The taught model, the data and the system prompt."""
    folder = tmp_path_factory.mktemp("verdict")
    (folder / "system.txt").write_text(SYSTEM)
    made = {"system": folder / "system.txt", "raw": tiny_folder, "taught": folder / "taught"}
    made["clear"] = write(folder, "clear", count=200)
    made["blind"] = write(folder, "blind", count=200, clear=False, seed=1)
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
    reasoning_tag="r", answer_tag="a", max_prompt_length=200, max_completion_length=40, eval_limit=40,
    num_generations=8, batch_size=4, num_steps=16, learning_rate=1e-3, preflight=False, save_steps=0,
)  # fmt: skip


def train(places, folder: Path, *, model: str = "taught", data: str = "clear", native: str = "fp32", **flags) -> Path:
    """Train as `grpo-ds train` does, in this process; return the run's folder. native: precision of the weights."""
    flags = {**COMMON, **flags}
    config = TrainConfig(model=str(places[model]), data=str(places[data]), system_prompt=str(places["system"]), **flags)
    ds = resolve_ds_config(places.get(config.ds, ROOT / config.ds), fill=config.ds_sizes(native=native))
    found = read_questions(config.data)
    asked, held_out = split_questions(found.questions, eval_fraction=config.eval_fraction, seed=config.seed)
    trainer = Trainer(config, ds, ranks.start(), Console(speaks=False), reward_functions(config, found))
    Run(trainer, asked, held_out[: config.eval_limit], folder).run()
    trainer.engine.close()
    return folder
