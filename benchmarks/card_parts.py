"""Parts of a stage: each a process of its own, run within a budget of seconds and recorded as one line of JSON.

A line is written when its part ends, so what is done is kept if the stage is killed. A part begins only if it is
expected to end within the budget; one that lasts longer is killed at the end of the budget.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = "CPU"  # the name of the card in records made without one
SPREAD = 1.2  # a part that took this many times less before is expected to end in time
SHOWN = 3000  # characters of a failed part's output that its line keeps


@dataclass(frozen=True, slots=True)
class Part:
    """A process that prints its figures as one line of JSON, its last, or writes them to the file "{json}".

    Example:
        Part("300 tokens", 60, ("benchmarks/logprobs.py", "--tokens", "300", "--json", "{json}"))
    """

    name: str
    seconds: float  # an upper estimate, before it has ever run
    command: tuple[str, ...]  # arguments of python, run in the repository's root; ends with 0 if all is right
    needs: tuple[str, ...] = ()  # packages; without one of them the part is skipped


@dataclass(frozen=True, slots=True)
class Line:
    """Outcome of a part on a card."""

    part: str
    outcome: str  # passed, failed, cut (at the end of the budget) or skipped
    seconds: float
    figures: dict[str, Any]
    why: str  # the end of a failed part's output; the reason of a skipped one
    card: str
    torch: str
    date: str


class Record:
    """The lines of one stage on one card, in a file that is only appended to; a part's last line counts."""

    def __init__(self, file: Path, card: str, torch: str = "") -> None:
        self.file, self.card, self.torch = file, card, torch

    def lines(self) -> dict[str, Line]:
        return {line.part: line for line in read_lines(self.file) if line.card == self.card}

    def add(self, part: str, outcome: str, seconds: float = 0.0, figures: Any = None, why: str = "") -> Line:
        day = time.strftime("%Y-%m-%d")
        line = Line(part, outcome, round(seconds, 1), figures or {}, why, self.card, self.torch, day)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # the line before was cut in the middle of its writing
            file.write(json.dumps({key: getattr(line, key) for key in Line.__slots__}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return line


def read_lines(file: Path) -> Iterator[Line]:
    """Yield the lines of a record, without one that was cut while it was written."""
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(json.JSONDecodeError):
            yield Line(**json.loads(text))


def run_stage(
    parts: Sequence[Part], record: Record, *, budget_s: float, again: bool = False, environment: dict[str, str]
) -> list[Line]:
    """Run the parts that have not passed before (all with `again`); return the last line of every part.

    The line of a part that was left out for lack of time has the outcome "left" and is not recorded.
    """
    end, before = time.monotonic() + budget_s, record.lines()
    done = []
    for part in parts:
        last, rest = before.get(part.name), end - time.monotonic()
        if last and last.outcome == "passed" and not again:
            done.append(last)
            print(f"{part.name}: passed on {last.date}", flush=True)
            continue
        if lacks := [name for name in part.needs if importlib.util.find_spec(name) is None]:
            done.append(record.add(part.name, "skipped", why=f"{', '.join(lacks)}: not installed"))
        elif (expected := expected_seconds(part, last)) > rest:
            why = f"about {expected:.0f} s are needed and {max(0, rest):.0f} s are left of {budget_s:.0f}"
            done.append(replace(Line(part.name, "left", 0.0, {}, why, record.card, record.torch, "")))
        else:
            done.append(record.add(part.name, *run_part(part, rest, environment)))
        print(in_one_line(done[-1]), flush=True)
    return done


def in_one_line(line: Line) -> str:
    said = json.dumps(line.figures) if line.figures else (line.why.splitlines() or [""])[-1]
    return f"{line.part}: {line.outcome} in {line.seconds:.0f} s: {said[:600]}"


def expected_seconds(part: Part, last: Line | None) -> float:
    """Return the seconds for which a part may last, from its last run on this card if there was one."""
    if last is None or last.outcome not in ("passed", "cut"):
        return part.seconds
    return SPREAD * last.seconds if last.outcome == "passed" else max(part.seconds, SPREAD * last.seconds)


def run_part(part: Part, limit: float, environment: dict[str, str]) -> tuple[str, float, dict[str, Any], str]:
    """Run a part for at most `limit` seconds; return outcome, seconds, figures and the end of a failure's output."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log, figures = Path(folder) / "log", Path(folder) / "figures.json"
        command = [sys.executable, *(word.replace("{json}", str(figures)) for word in part.command)]
        with log.open("wb") as output, running(command, output, environment) as process:
            try:
                outcome = "passed" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "cut"
        text = log.read_text(encoding="utf-8", errors="replace")
        found = figures_of(figures.read_text(encoding="utf-8") if figures.is_file() else text)
    return outcome, time.monotonic() - started, found, "" if outcome == "passed" else text[-SHOWN:]


@contextmanager
def running(command: Sequence[str], output: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start a process; when the block is left, by a signal too, end it with all that it started."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=inherited, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
        process.wait()


def figures_of(text: str) -> dict[str, Any]:
    """Return the JSON object of a text: all of it, or its last line that is one."""
    for candidate in (text, *reversed(text.splitlines())):
        if candidate.startswith("{"):
            with suppress(json.JSONDecodeError):
                return json.loads(candidate)
    return {}
