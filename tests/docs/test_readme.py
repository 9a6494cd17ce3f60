"""Every command of the main pages is run as a person would run it: in a shell, after `source .venv/bin/activate`.

Commands that take hours are made small here: flags are added at their end, where the later one wins; WAYS lists them
with the reason. A command that no way covers fails.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.system.ranks import _free_port
from tests.docs.test_recipes import plan_of

ROOT = Path(__file__).resolve().parents[2]
RUN_PAGES = [ROOT / name for name in ("README.md", "docs/commands.md", "docs/run_folder.md", "docs/data.md")]
README = RUN_PAGES[0].read_text(encoding="utf-8")
RUN = "outputs/RUN"
PATIENCE = 300  # seconds for one command, on a busy machine
FITS = re.compile(r"`(--model [^`]+)` \(([\d.]+), ([\d.]+)\)")


def commands() -> list[str]:
    """Return the lines of all ```bash blocks, continued ones joined, without comments."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in RUN_PAGES)
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```", pages, re.M | re.S)).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line))


COMMANDS = commands()
SMALL = (
    "--model {tiny} --num_steps 1 --num_generations 2 --batch_size 1 --max_prompt_length 480 --max_completion_length 4 "
    "--eval_limit 2 --learning_rate 1e-3"
)
IN_A_FOLDER = f"{SMALL} --output_dir {{folder}}"
ON_TWO = f"{IN_A_FOLDER} --preflight false"


@dataclass(frozen=True)
class Way:
    """The way in which commands with certain words are run."""

    holds: str
    adds: str = ""
    shows: str = ""  # a text that they print
    late: bool = False  # after the others: most need the folder outputs/RUN, which STOPPED makes and RESUMED resumes


STOPPED, KILL, RESUMED = "grpo-ds train --num_steps 40", "kill PID", "--resume_from_checkpoint outputs/RUN"
TABLE = "iconv -f CP1252"
WAYS = (  # the first that matches
    # make: CI runs these targets itself, or the commands are below. Here: the target exists and consists of commands.
    Way("make "),
    Way("source .venv/bin/activate"),  # .venv is the environment of these tests
    # Models of the hub: only their size matters, and a plan needs no weights, no launcher and no card.
    Way("--model qwen2.5", "--plan", "Memory plan:"),
    Way("grpo-ds train --config", "--plan", "Memory plan:"),
    Way("grpo-ds train --data", "--model smollm2-135m --plan", "Memory plan:"),
    Way("grpo-ds completion", "&& complete -p grpo-ds", "grpo-ds"),
    Way("grpo-ds --help", "", "report"),
    Way("grpo-ds data my_questions.json", "--model {tiny}", "my_questions.json: 20 questions (10 yes, 10 no)"),
    Way(TABLE),
    Way("grpo-ds data fragen.utf8.csv", "--model {tiny}", "fragen.utf8.csv: 20 questions (10 ja, 10 nein)", True),
    Way("grpo-ds select", "", "Run: grpo-ds train"),
    Way("grpo-ds profile", IN_A_FOLDER, "Worst case rehearsed"),
    # The tiny model from here on.
    Way(STOPPED, f"{SMALL} --num_steps 500 --output_dir {RUN} --data my_questions.json", "Resume with:", True),
    Way(KILL, "", "", True),  # stops the run before, which must save and end with 75
    Way(f"{RESUMED}/checkpoint-50", "--plan", "Memory plan:", True),  # the checkpoint has another number here
    Way(RESUMED, "", "After training: accuracy", True),  # one more step
    Way("--module", IN_A_FOLDER, "After training: accuracy"),
    Way("deepspeed launch/train.py --num_steps 3", IN_A_FOLDER, "After training: accuracy"),
    Way("accelerate launch", IN_A_FOLDER, "After training: accuracy"),
    Way("--num_gpus 2", ON_TWO, "After training: accuracy"),
    # Two machines are two launchers here; each gets its own number, as without ssh.
    Way("--hostfile hosts", ON_TWO, "After training: accuracy"),
    Way("--data quiz.json", IN_A_FOLDER, "After training: accuracy"),
    Way("grpo-ds eval", "--eval_limit 2", "accuracy", True),
    Way("grpo-ds ask --model outputs/RUN --question", "", "Answer:", True),
    Way("--file my_questions.json --json > answers.jsonl", "", "", True),
    Way("grpo-ds ask --model outputs/RUN", "--interactive", "Answer:", True),  # typed ahead, as there is no terminal
    Way("grpo-ds report", "", "report.html", True),
)


def way_of(command: str) -> Way:
    found = [way for way in WAYS if way.holds in command]
    assert found, f"A page has a command that is not run anywhere: {command}\nSay in WAYS how it can be."
    return found[0]


def the(words: str) -> str:
    """Return the command that is run in this way."""
    (command,) = (command for command in COMMANDS if way_of(command).holds == words)
    return command


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def question(number: int) -> dict[str, str]:
    texts = {"question": f"Does dose {number} help?", "context": f"It helped {number} of 20."}
    return {**texts, "ground_truth": ("yes", "no")[number % 2]}


def frage(number: int) -> str:
    return f"Hilft die Dosis {number} für Ältere?;Sie half {number} von 20.;{('ja', 'nein')[number % 2]}"


def riddle(number: int) -> dict[str, str]:
    return {"stem": f"What is {number} + {number}? A, B, C or D?", "key": "ABCD"[number % 4]}


class Shell:
    """A folder like a fresh clone, with the files that the pages name, and bash in it."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny = folder, tiny
        for name in ("launch", "ds_configs", "configs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "hosts").write_text("worker-1 slots=1\nworker-2 slots=1\n")
        for name, record in (("my_questions", question), ("quiz", riddle)):
            (folder / f"{name}.json").write_text(json.dumps([record(number) for number in range(20)]))
        table = "\n".join(["Frage;Abstract;Antwort", *map(frage, range(20))])
        (folder / "fragen.csv").write_text(table, encoding="cp1252")
        (folder / "quiz_prompt.txt").write_text("Reply <think>...</think><choice>A|B|C|D</choice>.")

    def start(self, command: str, **options: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            ["bash", "-c", f"source .venv/bin/activate && {command}"], cwd=self.folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options,
        )  # fmt: skip

    def end(self, process: subprocess.Popen, typed: str = "") -> Ended:
        try:
            output, _ = process.communicate(typed, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return Ended(process.returncode, output)

    def run(self, command: str) -> Ended:
        typed = "Does it help?\nIt helped 9 of 10.\n\n\n" if "--interactive" in self.adapted(command) else ""
        if "--hostfile" in command:
            return self.two_machines(command)
        return self.end(self.start(self.adapted(command)), typed)

    def adapted(self, command: str) -> str:
        """Return the command as it is run here."""
        way, folder = way_of(command), f"outputs/{COMMANDS.index(command)}"
        if command.startswith("make "):
            return f"make -C {ROOT} -n {command.removeprefix('make ')}"
        for checkpoint in sorted((self.folder / RUN).glob("checkpoint-*"))[:1]:  # the step at which it was stopped
            command = command.replace("checkpoint-50", checkpoint.name)
        if way.adds == "--plan":
            command = command.replace("deepspeed launch", "python launch")
        if command.startswith("deepspeed "):  # its default port may be in use by another run
            command = command.replace("deepspeed ", f"deepspeed --master_port {_free_port()} ", 1)
        return f"{command} {way.adds.format(tiny=self.tiny, folder=folder)}".strip()

    def two_machines(self, command: str) -> Ended:
        here = self.adapted(command).replace("--hostfile", "--master_addr 127.0.0.1 --no_ssh --node_rank {} --hostfile")
        first, second = (self.start(here.format(number)) for number in range(2))
        with ThreadPoolExecutor() as both:
            ends = [both.submit(self.end, process) for process in (first, second)]
        return max((end.result() for end in ends), key=lambda ended: (ended.code != 0, len(ended.output)))

    def stopped_and_resumed(self) -> dict[str, Ended]:
        """Make outputs/RUN by three commands of the pages: a run that is killed, and resumed to the next step."""
        train, kill, resume = (the(way) for way in (STOPPED, KILL, RESUMED))
        run = self.start(self.adapted(train))
        wait_until(lambda: (self.folder / RUN / "metrics.jsonl").exists() or run.poll() is not None)
        assert run.poll() is None, self.end(run).output[-2000:]
        killed = self.end(self.start(kill.replace("PID", str(self.status()["pid"]))))
        stopped = self.end(run)
        another_step = f"{self.adapted(resume)} --num_steps {self.status()['step'] + 1}"
        return {train: stopped, kill: killed, resume: self.end(self.start(another_step))}

    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / RUN / "run_status.json").read_text())


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < end:
        time.sleep(0.2)


@pytest.fixture(scope="module")
def ended(tiny_folder, tmp_path_factory):
    """Run all commands and return command -> its end: two at a time, the late ones last."""
    shell = Shell(tmp_path_factory.mktemp("clone"), tiny_folder)
    with ThreadPoolExecutor(2) as pool:
        chain = pool.submit(shell.stopped_and_resumed)
        later = [command for command in COMMANDS if way_of(command).late]
        ends: dict[str, Future[Ended]] = {c: pool.submit(shell.run, c) for c in COMMANDS if c not in later}
        done = chain.result()
        ends |= {command: pool.submit(shell.run, command) for command in later if command not in done}
    return shell.folder, {**done, **{command: end.result() for command, end in ends.items()}}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_works(ended, command):
    result, way = ended[1][command], way_of(command)
    assert result.code == (75 if way.holds == STOPPED else 0), result.output[-2000:]
    assert way.shows in result.output and "Traceback" not in result.output, result.output[-2000:]


def test_the_commands_leave_the_files_that_the_page_names(ended):
    folder, _ = ended
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 20 and all({"question", "answer", "text"} <= answer.keys() for answer in answers)
    page = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    section = page.partition("## Files")[2].partition("\n## ")[0]
    files = re.findall(r"`([\w.]+\.(?:jsonl?|html|md|yaml|svg))`", section)
    optional = {"completions.jsonl"}  # with --log_completions
    assert len(files) > 9
    assert [name for name in files if name not in optional and not (folder / RUN / name).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 120
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\]\(([^)#]+)", README)) == set()


@pytest.mark.parametrize(("row", "column"), [(row, column) for row in (16, 32, 64) for column in (12, 16, 24)])
def test_the_table_of_models_that_fit_equals_the_plan(monkeypatch, row, column):
    monkeypatch.chdir(ROOT)
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row} GB RAM |"))
    cell = line.strip("| ").split(" | ")[1 + (12, 16, 24).index(column)]
    assert FITS.findall(cell) or cell.startswith("the same")
    for flags, card, ram in FITS.findall(cell):
        plan = plan_of(flags, column, row)
        assert (f"{plan.peak('gpu') / 2**30:.1f}", f"{plan.peak('ram') / 2**30:.1f}") == (card, ram)


def test_every_link_leads_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "ds_configs" / "README.md"):
        links = re.findall(r"\]\(([^)#:\s]*)#?([\w-]*)\)", page.read_text(encoding="utf-8"))
        targets = [(page.parent / file if file else page, heading) for file, heading in links]
        assert [file for file, heading in targets if not file.exists()] == [], page.name
        assert [heading for file, heading in targets if heading and heading not in headings(file)] == [], page.name


def headings(page: Path) -> set[str]:
    """Return the names under which a page's headings are linked."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
