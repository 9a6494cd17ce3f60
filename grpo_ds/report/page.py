"""report.html: a run on one page that opens offline, made from the run's folder alone; no torch.

The page has no script and asks for nothing: its Content-Security-Policy refuses both. Every text goes through jinja2's
autoescape; only the drawings of charts.py, which hold no text of a run, are put in as they are.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grpo_ds.report import answers, charts, curves, memory_use, verdict
from grpo_ds.report.run_files import (
    COMPLETIONS_FILE,
    ENVIRONMENT_FILE,
    HELD_OUT_FILE,
    MEMORY_FILE,
    Damaged,
    RunFiles,
    mapping,
    read_run,
    text,
)
from grpo_ds.run_folder.checkpoints import write_whole
from grpo_ds.settings.config import CONFIG_FILE, OF_ONE_RUN, TrainConfig

REPORT_FILE, TEMPLATE = "report.html", "page.html.jinja"
NEXT_LINE = " \\\n  "  # of a command
WRONG = (Damaged, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag of the run; default: in words, where the run's differs."""

    name: str
    value: str
    default: str | None


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Raises UsageError where `folder` holds no run, OSError where the page cannot be written."""
    output = output or folder / REPORT_FILE
    write_whole(output, page(read_run(folder)))
    return output


def page(run: RunFiles) -> str:
    """The whole file, of what the run has."""
    _drop_what_is_wrong(run)
    source = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return source.get_template(TEMPLATE).render(**_contents(run))


def _contents(run: RunFiles) -> dict[str, Any]:
    return {
        "run": run,
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "state": verdict.state(run),
        "verdict": verdict.verdict(run),
        "collapsed": verdict.collapsed(run),
        "tiles": verdict.tiles(run),
        "grades": verdict.grades_table(run),
        "curves": curves.curves(run),
        "phase_bars": memory_use.phase_bars(run),
        "timelines": memory_use.timelines(run),
        "pairs": answers.pairs(run),
        "samples": answers.samples(run),
        "settings": settings(run),
        "machine": machine(run),
        "versions": versions(run),
        "command": command(run),
    }


def settings(run: RunFiles) -> list[Setting]:
    """Those of grpo_config.yaml; of one that this version does not know there is no default to differ from."""
    defaults = {knob.name: knob.default for knob in fields(TrainConfig) if knob.name not in OF_ONE_RUN}
    made = []
    for name, value in run.config.items():
        known = name in defaults and value == defaults[name]
        default = None if known else text(defaults[name]) if name in defaults else "not known to this version"
        made.append(Setting(text(name), text(value), default))
    return made


def machine(run: RunFiles) -> list[tuple[str, str]]:
    """What the run was computed on."""
    found = run.environment
    shown = {
        "Processor": found.get("cpu"),
        "Threads": found.get("threads"),
        "RAM": f"{found['ram_gib']} GiB" if "ram_gib" in found else None,
        "Cards": "; ".join(found.get("gpus", [])) or "none" if found else None,
        "Ranks": found.get("ranks"),
    }
    return [(name, text(value)) for name, value in shown.items() if value is not None]


def versions(run: RunFiles) -> list[tuple[str, str]]:
    found = mapping(run.environment.get("versions", {}))
    return [(text(name), "not installed" if version is None else text(version)) for name, version in found.items()]


def command(run: RunFiles) -> str:
    """As a person types it, a line a flag."""
    words = [str(word) for word in run.environment.get("command", [])]
    return text("".join((NEXT_LINE if word.startswith("--") else " ") + shlex.quote(word) for word in words).strip())


def _drop_what_is_wrong(run: RunFiles) -> None:
    """A file that parses and yet cannot be shown is left out as one that does not parse is."""
    shown: dict[str, tuple[str, list[Callable[[RunFiles], object]]]] = {
        "held_out": (
            HELD_OUT_FILE,
            [verdict.verdict, verdict.collapsed, verdict.grades_table, answers.pairs, curves.held_out_accuracy],
        ),
        "memory": (MEMORY_FILE, [memory_use.phase_bars, memory_use.bands]),
        "completions": (COMPLETIONS_FILE, [answers.samples]),
        "environment": (ENVIRONMENT_FILE, [machine, versions, command]),
        "config": (CONFIG_FILE, [settings]),
    }
    for part, (file, makers) in shown.items():
        try:
            for make in makers:
                make(run)
        except WRONG:
            run.damaged.append(file)
            setattr(run, part, {})
