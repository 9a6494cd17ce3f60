"""report.html: a run on one page that opens offline, made only from the files in the run's folder. No torch.

The page has no script and loads nothing: its Content-Security-Policy forbids both. Every text goes through jinja2's
autoescape; only the drawings of charts.py, which contain no text of a run, are inserted unescaped, and the marks of
words.py around words of escaped texts.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grpo_ds.report import answers, charts, curves, key_figures, memory_page, verdict, words
from grpo_ds.report.run_files import Damaged, RunFiles, as_object, as_text, read_run
from grpo_ds.run_folder.files import (
    COMPLETIONS_FILE,
    ENVIRONMENT_FILE,
    HELD_OUT_FILE,
    MEMORY_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
)
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import CONFIG_FILE, OF_ONE_RUN
from grpo_ds.system.files import write_whole

TEMPLATE = "page.html.jinja"
COMMAND = ("grpo-ds train", "THIS_FOLDER")  # words of the command of the next run; the page does not know its folder
NEXT_LINE = " \\\n  "  # of a command
WRONG = (Damaged, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag of the run. default: as text; None if the run uses the default."""

    name: str
    value: str
    default: str | None


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page. Raises UsageError if `folder` holds no run, OSError if the page cannot be written."""
    output = output or folder / REPORT_FILE
    write_whole(output, page(read_run(folder)))
    return output


def page(run: RunFiles) -> str:
    """Return the page, with a section for everything that the run has."""
    _drop_damaged(run)
    source = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source.filters["explained"] = words.explained
    return source.get_template(TEMPLATE).render(**_contents(run))


def _contents(run: RunFiles) -> dict[str, Any]:
    return {
        "run": run,
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "about": key_figures.about(run),
        "state": key_figures.state(run),
        "verdict": verdict.of(run),
        "train": COMMAND,
        "warnings": [warning for warning in [key_figures.changed(run)] if warning],
        "tiles": key_figures.tiles(run),
        "grades": key_figures.grades_table(run),
        "curves": curves.curves(run),
        "phase_bars": memory_page.phase_bars(run),
        "timelines": memory_page.timeline_charts(run),
        "pairs": answers.pairs(run),
        "sampled_steps": answers.sampled_steps(run),
        "settings": settings(run),
        "machine": machine(run),
        "versions": versions(run),
        "command": command_line(run),
    }


def settings(run: RunFiles) -> list[Setting]:
    """Return the settings of grpo_config.yaml; settings that this version does not know have no default."""
    defaults = {flag.name: flag.default for flag in fields(TrainConfig) if flag.name not in OF_ONE_RUN}
    made = []
    for name, value in run.config.items():
        if name not in defaults:
            default: str | None = "not in this version"
        else:
            default = None if value == defaults[name] else as_text(defaults[name])
        made.append(Setting(as_text(name), as_text(value), default))
    return made


def machine(run: RunFiles) -> list[tuple[str, str]]:
    """Return the rows about the run's machine."""
    environment = run.environment
    shown = {
        "Processor": environment.get("cpu"),
        "Threads": environment.get("threads"),
        "RAM": f"{environment['ram_gib']} GiB" if "ram_gib" in environment else None,
        "GPUs": "; ".join(environment.get("gpus", [])) or "none" if environment else None,
        "Ranks": environment.get("ranks"),
    }
    return [(name, as_text(value)) for name, value in shown.items() if value is not None]


def versions(run: RunFiles) -> list[tuple[str, str]]:
    """Return the rows about package versions."""
    packages = as_object(run.environment.get("versions", {})).items()
    return [(as_text(name), "not installed" if version is None else as_text(version)) for name, version in packages]


def command_line(run: RunFiles) -> str:
    """Return the command as typed, with a line for each flag; behind it those that resumed the run."""
    commands = run.environment.get("commands") or [run.environment.get("command", [])]
    return "\n".join(_as_typed([str(word) for word in words]) for words in commands)


def _as_typed(words: list[str]) -> str:
    return as_text("".join((NEXT_LINE if word.startswith("--") else " ") + shlex.quote(word) for word in words).strip())


def _drop_damaged(run: RunFiles) -> None:
    """Leave out a file that parses but cannot be shown, as if it did not parse."""
    shown: dict[str, tuple[str, list[Callable[[RunFiles], object]]]] = {
        "held_out": (
            HELD_OUT_FILE,
            [verdict.of, key_figures.about, key_figures.grades_table, answers.pairs, curves.held_out_lines],
        ),
        "memory": (MEMORY_FILE, [memory_page.phase_bars, memory_page.timelines]),
        "completions": (COMPLETIONS_FILE, [answers.sampled_steps]),
        "environment": (ENVIRONMENT_FILE, [machine, versions, command_line]),
        "config": (CONFIG_FILE, [settings]),
        "summary": (SUMMARY_FILE, [key_figures.about]),
    }
    for part, (file, makers) in shown.items():
        try:
            for make in makers:
                make(run)
        except WRONG:
            run.damaged.append(file)
            setattr(run, part, {})
