"""Every remedy that a message or a document recommends is executed: what it names is accepted, and the error is gone.

The first half reads the recommendations from the texts themselves, so that a new one is tested without a line here.
The second half is a table: the case of a message -> its remedy -> the same call, now accepted.
"""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pytest

from grpo_ds.commands import ask, evaluate, report, select
from grpo_ds.commands.settle import settle
from grpo_ds.errors import MAX_LINES, GrpoError
from grpo_ds.memory.select import REMEDIES as MEMORY_REMEDIES
from grpo_ds.memory.select import Job, applied
from grpo_ds.models.presets import EMBEDDED, PRESETS
from grpo_ds.models.shapes import shape_of
from grpo_ds.settings.command_line import parse
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.ds_config import resolve_ds_config
from grpo_ds.settings.run_flags import TRACKERS
from grpo_ds.settings.saved_config import CONFIG_FILE
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.prompts import encode_prompt
from grpo_ds.task.questions import read_questions, split_questions
from grpo_ds.task.rewards import READY_MADE
from grpo_ds.task.worked_examples import worked_examples
from tests.docs.test_readme import RUN_PAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs" / "README.md"]
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]  # they tell what was once so
CONFIGS = {
    "train": TrainConfig, "select": select.SelectConfig, "ask": ask.QuestionConfig, "evaluate": evaluate.GradingConfig,
}  # fmt: skip
OWNER = {it.name: (config, it.type) for config in reversed(CONFIGS.values()) for it in fields(config)}  # of a flag
OURS = OWNER.keys() | {"config", "print_config", "help"}
OTHERS = {  # flags of other programs, and of commands that take no config
    *("hostfile", "num_gpus", "num_nodes", "nnodes", "nproc_per_node", "include", "master_port", "module"),
    *("local_rank", "no-deps", "install", "shutdown", "logdir", "project", "tasks", "model_args", "version"),
    *("output", "id", "query-gpu", "format", "device", "steps", "series"),
    *("no-index", "no-binary", "target", "docs", "stage", "rounds", "python", "cuda"),  # of pip and of benchmarks/
    *("dtype", "preset", "completion", "loss"),
    *("port", "max-model-len", "enable-lora", "max-lora-rank", "lora-modules", "outtype", "outfile", "jinja", "merge"),
}  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*\b)(?:[ =](?![->])([^\s`;\"')\]}]+))?")
NEEDS = {  # a recommended flag -> the flags that its text presupposes
    "load_in_4bit": "--lora_r 16", "load_in_8bit": "--lora_r 16", "merge_adapter": "--lora_r 16",
    "lora_alpha": "--lora_r 16", "lora_target": "--lora_r 16", "labels": "--few_shot 0", "answer_tag": "--few_shot 0",
    "eval_steps": "--save_steps 120", "ref_model_mixup_alpha": "--sync_ref_model --reference bf16",
    "ref_model_sync_steps": "--sync_ref_model --reference bf16", "sync_ref_model": "--reference bf16",
    "answers none": "--reward_funcs format", "gpu_gib": "--plan", "ram_gib": "--plan",
    "reward_funcs": "--reward_weights null", "overlong_buffer 60": "--max_completion_length 300",
}  # fmt: skip
OF_EVAL = {("eval_fraction", "1")}  # train has a flag of this name, which refuses this value
PLACEHOLDER = re.compile(r".*[{<].*|.*[A-Z.]{2}.*|[A-Z]|outputs/.*|.*/\.\./.*|my_.*|.*\.(json|txt)")


def page_spans(page: Path) -> Iterator[str]:
    """Yield the code of a page: blocks and words in backticks."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    yield from re.findall(r"`([^`]+)`", re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.M | re.S))


def messages() -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every text in the code that is no docstring, with {...} for what it fills in."""
    for file in sorted((ROOT / "grpo_ds").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        hidden = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        hidden |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)
                yield file.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
                yield file.name, node.value


def recommended() -> dict[tuple[str, str], str]:
    """Return (flag, value) -> where it is recommended; value "" if the text gives none."""
    texts = [(page.name, span) for page in PAGES for span in page_spans(page)]
    found: dict[tuple[str, str], str] = {}
    for where, text in [*texts, *messages()]:
        for flag, values in FLAG.findall(text.replace("\\\n", " ")):
            for value in values.rstrip(".:,").split("\\|"):  # a table's cell lists the choices as one\|other
                found.setdefault((flag, "" if PLACEHOLDER.fullmatch(value) else value), where)
    return found


RECOMMENDED = recommended()
PROSE = {"out", "cannot", "names", "needs", "and", "already", "holds", "is", "says", "with"}  # a sentence goes on


def is_value(flag: str, value: str) -> bool:
    """False for a word that only follows the flag in a sentence, as in "leave --reference out"."""
    if flag not in OWNER or flag in ("model", "data", "output_dir", "resume_from_checkpoint", "resume_changed_inputs"):
        return False  # they need files and folders: the cases below
    takes_words = OWNER[flag][1] not in (bool, int, float, bool | None, int | None, float | None)
    return value not in PROSE and (takes_words or value in ("true", "false") or not re.fullmatch(r"[a-z]+", value))


VALUES = sorted((flag, value) for flag, value in RECOMMENDED if value and is_value(flag, value))


def test_every_recommended_flag_exists():
    assert {flag: where for (flag, _), where in RECOMMENDED.items() if flag not in OURS | OTHERS} == {}


def test_the_texts_recommend_flags_and_values():
    assert len(RECOMMENDED) > 150 and len(VALUES) > 90  # else the texts were not found


def accepted(flags: str, model: str = EMBEDDED) -> TrainConfig:
    """Settle a run with these flags: everything up to the loading of the model is checked."""
    named = [] if "--resume_from_checkpoint" in flags else ["--model", model]  # a checkpoint knows its model
    return settle([*named, *shlex.split(flags)]).config


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("flag", "value"), VALUES)
def test_a_recommended_value_is_accepted(flag, value):
    config, _ = OWNER[flag]
    words = f"--{flag} {shlex.quote(value)} {NEEDS.get(flag, '')} {NEEDS.get(f'{flag} {value}', '')}"
    if flag == "reward_weights":  # as many functions as numbers
        words += f" --reward_funcs {','.join(READY_MADE[: value.count(',') + 1])}"
    if config is TrainConfig and (flag, value) not in OF_EVAL:
        accepted(words)
        return
    parse(evaluate.GradingConfig if config is TrainConfig else config, shlex.split(words), about="").config()


TOGETHER = sorted(
    {span for page in PAGES for span in page_spans(page) if re.fullmatch(r"(--\w+( [\w.,-]+)?\s?){2,}", span)}
)


@pytest.mark.parametrize("span", TOGETHER)
def test_flags_that_are_recommended_together_are_accepted_together(span):
    if PLACEHOLDER.search(span) is None or "FOLDER" not in span:
        accepted(re.sub(r"\s+", " ", span), model="qwen2.5-3b")


@pytest.mark.parametrize("name", sorted({value for flag, value in RECOMMENDED if flag == "model" and value in PRESETS}))
def test_a_recommended_model_is_known(name):
    assert shape_of(name).parameters == PRESETS[name].parameters


def commands() -> list[str]:
    """Return the commands of all pages but those whose commands are run by test_readme.py."""
    spans = [span for page in PAGES if page not in RUN_PAGES for span in page_spans(page)]
    lines = [line for span in spans for line in span.replace("\\\n", " ").splitlines()]
    return sorted({" ".join(line.split()) for line in lines if COMMAND.search(line)})


NAMES = "train|profile_memory|select_model|evaluate_model|eval|ask"
COMMAND = re.compile(rf"(?:launch/|grpo-ds )({NAMES})\b(?:\.py)?([^#]*)")
SCRIPTS = {"profile_memory": "train", "select_model": "select", "evaluate_model": "evaluate", "eval": "evaluate"}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_page_is_accepted(command):
    name, rest = COMMAND.search(command).groups()
    rest = re.sub(r" > \S+$", "", rest.strip())
    rest = re.sub(r"outputs/\S+\.yaml", "configs/smollm2-laptop.yaml", rest)  # the settings of a run
    filled = re.sub(
        r"outputs/\S+|\S+\.gguf|NAME_OR_FOLDER|FOLDER", EMBEDDED, rest.replace("...", "text").replace("FLAGS", "")
    )
    words = shlex.split(filled)
    if words and OWNER.get(words[-1].lstrip("-"), (None, bool))[1] is not bool:
        words.append("text")  # the page leaves the value open
    if "--resume_from_checkpoint" in words:  # the cases below resume a real run
        words = words[: words.index("--resume_from_checkpoint")]
    config = CONFIGS[SCRIPTS.get(name, name)]
    settle(words) if config is TrainConfig else parse(config, words, about="").unchecked()


# --- a message's case -> its remedy -> what is then true ---------------------------------------------


@dataclass(frozen=True)
class Case:
    """Flags that are refused, a text of the message, and the flags that it leads to; "" in `says`: `flags` replace."""

    wrong: str
    says: str  # a remedy, word for word in the message
    right: str | None = None  # the flags then; None: the remedy is added to the wrong flags


SHIPPED = [f"ds_configs/{file.name}" for file in sorted((ROOT / "ds_configs").glob("*.json"))]
CASES = [
    Case("--num_generations 1", "--num_generations 4"),
    Case("--labels A,B --few_shot 3", "--few_shot 2"),
    Case("--labels yes", "yes,no", "--labels yes,no"),
    Case("--load_in_4bit", "--lora_r 16"),
    Case("--load_in_8bit", "--lora_r 16"),
    Case("--merge_adapter", "--lora_r 16"),
    Case("--lora_r 8 --reference bf16", "leave --reference out", "--lora_r 8"),
    Case("--lora_r 8 --lora_target lm_head", "--lora_target all-linear"),
    Case("--lora_r 8 --lora_target lm_head", "up_proj", "--lora_r 8 --lora_target up_proj"),
    Case("--lora_r 8 --lora_target a,,b", "q_proj,v_proj", "--lora_r 8 --lora_target q_proj,v_proj"),
    Case("--sync_ref_model", "--reference bf16"),
    Case("--sync_ref_model", "--ref_model_mixup_alpha 1"),
    Case("--sync_ref_model --lora_r 8", "--ref_model_mixup_alpha 1"),
    Case("--pack_tokens 100", "0: the complete step in one batch", "--pack_tokens 0"),
    Case("--num_stepz 3", "--num_steps", "--num_steps 3"),
    Case("--learning-rat 1e-6", "--learning_rate", "--learning_rate 1e-6"),
    Case("--reference int4", "bf16-cpu", "--reference bf16-cpu"),
    Case("--on_reward_error skip", "stop, zero", "--on_reward_error zero"),
    *(Case("--ds nowhere.json", name, f"--ds {name}") for name in SHIPPED),
    *(Case("--report_to tensorbored", name, f"--report_to {name}") for name in (*TRACKERS, "none")),
    Case("--answer_tag '<answer>'", "without its brackets", "--answer_tag answer"),
    *(Case("--model nowhere/model", name, f"--model {name}") for name in PRESETS),
    Case("--config {empty}", "num_steps: 40", "--config {one_setting}"),
    Case("--model {gpt2} --max_prompt_length 100 --max_completion_length 60", "--max_prompt_length 68"),
    Case(
        "--model {gpt2} --max_prompt_length 10 --max_completion_length 128",
        "--max_prompt_length 64 --max_completion_length 64",
    ),
    Case("--model {adapter} --lora_r 4", "--lora_r 0"),
    Case("--model {adapter} --lora_r 4", "merged", "--model {merged} --lora_r 4"),
    Case("--resume_from_checkpoint auto", "--output_dir FOLDER", "--resume_from_checkpoint auto --output_dir {run}"),
    Case("--resume_from_checkpoint {run}/checkpoint-9", "checkpoint-1", "--resume_from_checkpoint {run}/checkpoint-1"),
    Case("--resume_from_checkpoint {run} --beta 0.5", "Leave them out", "--resume_from_checkpoint {run}"),
    Case(
        "--resume_from_checkpoint {run} --beta 0.5",
        "--model {run}/checkpoint-1 --output_dir ANOTHER",
        "--model {run}/checkpoint-1 --output_dir {new} --beta 0.5",
    ),
    Case(
        "--resume_changed_inputs",
        "--resume_from_checkpoint FOLDER",
        "--resume_changed_inputs --resume_from_checkpoint {run}",
    ),
    Case(
        "--resume_from_checkpoint {tiny}",
        "leave --resume_from_checkpoint out and name another --output_dir",
        "--model {tiny} --output_dir {new}",
    ),
]


@pytest.fixture(scope="module")
def places(tiny_folder, tmp_path_factory):
    """Folders that the cases name: models by their config alone, an adapter, a run with a checkpoint."""
    from grpo_ds.training.run import Run
    from tests.models.test_shapes import folder_with
    from tests.training.test_training import tiny_trainer

    folder = tmp_path_factory.mktemp("places")
    for name in ("gpt2", "merged", "new"):
        (folder / name).mkdir()
    folder_with({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, folder / "gpt2")
    (folder / "empty.yaml").write_text("")
    (folder / "one.yaml").write_text("num_steps: 40\n")
    made = {"gpt2": folder / "gpt2", "empty": folder / "empty.yaml", "one_setting": folder / "one.yaml"}
    small = {"num_generations": 2, "num_steps": 1, "max_completion_length": 4, "ds": "ds_configs/zero2.json"}
    for name, flags in ("run", {"save_steps": 1}), ("adapter", {"lora_r": 4, "merge_adapter": True}):
        trainer, train, held_out = tiny_trainer(tiny_folder, **small, **flags)
        Run(trainer, train, held_out, folder / name).run()
        trainer.engine.close()
    made |= {"run": folder / "run", "adapter": folder / "adapter", "merged": folder / "adapter" / "merged"}
    return {**made, "tiny": tiny_folder, "new": folder / "new" / "run"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.wrong} -> {case.says}"[:70])
def test_a_remedy_ends_the_error_that_recommends_it(places, case):
    wrong, says = case.wrong.format(**places), case.says.format(**places)
    right = f"{wrong} {says}" if case.right is None else case.right.format(**places)
    with pytest.raises(GrpoError) as error:
        accepted(wrong)
    assert says in str(error.value) and len(str(error.value).splitlines()) <= MAX_LINES, error.value
    accepted(right)


# --- remedies that are tables in the code ------------------------------------------------------------

STARTS = ("", "--reference bf16", "--sync_ref_model --reference bf16", "--lora_r 8", "--model {adapter}",
          "--ds ds_configs/zero2_gpu.json", "--overlong_buffer 250", "--gradient_checkpointing false")  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_every_memory_remedy_is_accepted_where_it_is_recommended(places, start):
    flags = f"--model qwen2.5-3b {start.format(**places)}"
    settled = settle(shlex.split(flags))
    ds = resolve_ds_config(settled.config.ds, fill=settled.config.ds_sizes(native="bf16"))
    job, tried = Job(settled.job.shape, settled.config, ds, "cuda"), 0
    for remedy in MEMORY_REMEDIES:
        if remedy.change.startswith("--") and applied(job, (remedy,)):
            settle(shlex.split(f"{flags} {remedy.change}"))
            tried += 1
    assert tried > 3


def flags_in(text: str) -> list[str]:
    found = [(flag, value.rstrip(".:,")) for flag, value in FLAG.findall(text)]
    return [f"--{flag} {value}" for flag, value in found if value and is_value(flag, value)]


def test_what_helps_against_full_memory_and_bad_numbers_is_accepted():
    from grpo_ds.memory.phases import RELIEF
    from grpo_ds.training.nonfinite import REMEDIES as NUMBER_REMEDIES

    relief = [flag for pair in RELIEF.values() for text in pair for flag in flags_in(text)]
    numbers = [flag for text in NUMBER_REMEDIES.values() for flag in flags_in(text)]
    assert len(relief) >= 8 and len(numbers) >= 2
    for flag in {*relief, *numbers}:
        accepted(flag)


# --- remedies for data -------------------------------------------------------------------------------


def records(folder: Path, labels: list[str]) -> str:
    file = folder / "data.json"
    made = [{"question": f"Does {n} help?", "context": "It did.", "ground_truth": it} for n, it in enumerate(labels)]
    file.write_text(json.dumps(made))
    return str(file)


def remedy_in(call, pattern: str) -> str:
    """Return the first group of `pattern` in the message of the error that `call` must raise."""
    with pytest.raises(GrpoError) as error:
        call()
    found = re.search(pattern, str(error.value))
    assert found, error.value
    return found[1]


def test_labels_that_are_recommended_read_the_file(tmp_path):
    file = records(tmp_path, ["maybe", "maybe"])
    labels = remedy_in(lambda: read_questions(file), r"--labels ([\w,]+)")
    assert len(read_questions(file, labels=tuple(labels.split(","))).questions) == 2


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_as_many_records_as_recommended_can_be_split(tmp_path, fraction):
    questions = read_questions(records(tmp_path, ["yes"] * 600)).questions
    fewest = int(remedy_in(lambda: split_questions(questions[:1], eval_fraction=fraction, seed=0), r"at least (\d+)"))
    assert all(split_questions(questions[:fewest], eval_fraction=fraction, seed=0))


def test_a_file_in_a_folder_is_found_as_recommended(tmp_path):
    records(tmp_path, ["yes", "no"])
    pattern = remedy_in(lambda: read_questions(str(tmp_path)), r"--data (\S+FILE\.json)")
    assert len(read_questions(pattern.replace("FILE", "data")).questions) == 2
    sample = remedy_in(lambda: read_questions("nowhere.json"), r"--data (sample)")
    assert len(read_questions(sample).questions) > 10


def test_the_report_that_is_recommended_is_written(places, tmp_path):
    remedy_in(lambda: report.main([str(places["run"] / "checkpoint-1")]), r"(--output_dir) of a training run")
    report.main([str(places["run"])])
    remedy_in(lambda: report.main([str(places["run"]), "--output", str(tmp_path / "a.txt")]), r"(\.html)")
    report.main([str(places["run"]), "--output", str(tmp_path / "a.html")])
    assert (tmp_path / "a.html").read_text().lower().startswith("<!doctype html>")


def test_a_share_that_is_recommended_splits(tmp_path):
    questions = read_questions(records(tmp_path, ["yes", "no"] * 5)).questions
    share = remedy_in(lambda: split_questions(questions, eval_fraction=1.0, seed=0), r"--eval_fraction (\d\.\d+)")
    assert all(split_questions(questions, eval_fraction=float(share), seed=0))


def test_a_label_is_chosen_by_the_flag_that_is_recommended(tmp_path):
    record = {"question": "Does it?", "context": "It does.", "ground_truth": "yes", "final_decision": "no"}
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record]))
    flag = remedy_in(lambda: read_questions(str(file)), r"choose with --(\w+)")
    found = read_questions(str(file), fields={flag.removesuffix("_field"): "final_decision"})
    assert found.questions[0].label == "no"


def test_a_prompt_fits_into_the_length_that_is_recommended(tokenizer):
    form = AnswerFormat(("yes", "no"))
    question, _ = worked_examples(form)[0]
    encode = partial(encode_prompt, tokenizer, question, answer_format=form, few_shot=1, prefill=True)
    needed = int(remedy_in(lambda: encode(max_prompt_length=5), r"raise --max_prompt_length to (\d+)"))
    assert len(encode(max_prompt_length=needed).ids) == needed
    remedy_in(lambda: encode(max_prompt_length=needed - 1), r"lower (--few_shot)")
    assert encode(max_prompt_length=needed - 1, few_shot=0).ids


def test_a_damaged_config_beside_a_model_is_removed_as_recommended(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / CONFIG_FILE).write_text("- not: settings\n")
    remedy_in(
        lambda: accepted("--num_steps 3", model=str(tmp_path / "model")), "(remove it and give the prompt's flags)"
    )
    (tmp_path / "model" / CONFIG_FILE).unlink()
    assert accepted("--labels A,B --few_shot 0", model=str(tmp_path / "model")).label_names == ("A", "B")


@pytest.mark.parametrize(
    "flags", ["", "--labels yes,no,maybe --eval_limit 7", "--lora_r 8", "--beta 0", "--num_steps 3"]
)
@pytest.mark.parametrize(("gpu", "ram"), [(0, 16), (8, 16), (12, 32), (24, 64), (6, 6)])
def test_the_command_that_select_recommends_is_accepted(capsys, flags, gpu, ram):
    select.main(["--gpu_gib", str(gpu), "--ram_gib", str(ram), *shlex.split(flags)])
    printed = " ".join(capsys.readouterr().out.split())
    ready = re.search(r"Run: (?:deepspeed|python) \S+train\.py (.*)$", printed)
    would = re.search(r"Nothing fits yet\. (?:deepspeed|python) \S+train\.py (.*) would with: (.*)$", printed)
    never = re.search(r"even with all changes\. Without a GPU: (--model \S+)$", printed)
    recommended = ready or would or never
    assert recommended, printed
    changes = re.findall(r"(--\w+ \S+) \(costs", would[2]) if would else []
    settle(shlex.split(" ".join([recommended[1], *changes])))
