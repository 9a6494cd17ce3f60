"""argv and YAML to a checked config: jsonargparse, with errors that fit six lines.

Nothing heavy is imported here: --help and a mistyped flag are answered at once.
"""

import difflib
import re
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from grpo_ds.core.objective import KlEstimator, LossType, RewardScale
from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.config import AskConfig, ReferenceKind
from grpo_ds.system.invocation import program
from grpo_ds.task.prompts import worked_examples
from grpo_ds.task.scoring import OnRewardError

ConfigType = TypeVar("ConfigType", bound=AskConfig)
SECRET = re.compile(r"[\w-]*(api_?key|token|secret|passw(or)?d)|([\w-]*[_-])?key", re.IGNORECASE)


@dataclass(frozen=True)
class Parsed(Generic[ConfigType]):
    """What the command line and its YAML file said."""

    config: ConfigType
    typed: frozenset[str]  # names given by the person, not by a default or a recipe


def parse(
    config_type: type[ConfigType],
    argv: list[str],
    *,
    about: str,
    recipe: Mapping[str, Any] | None = None,
) -> Parsed[ConfigType]:
    """argv -> a checked config. Raises UsageError, one for all that is wrong.

    recipe: defaults that suit the model.
    """
    names = {knob.name for knob in fields(config_type)}
    _check_secrets(argv, names)
    parser = _parser(config_type, about, {k: v for k, v in (recipe or {}).items() if k in names})
    _check_names(argv, {*names, "config", "print_config", "local_rank", "help"})
    for file in _config_files(argv):
        _check_file(file)
    try:
        values = parser.parse_args(argv).as_dict()
        typed = parser.parse_args(argv, defaults=False).as_dict()
    except (ArgumentError, ValueError, OSError) as error:
        raise UsageError(_shortened(str(error), names)) from None
    if "few_shot" in (recipe or {}) and "few_shot" not in typed:  # a recipe's examples are those that fit the labels
        values["few_shot"] = min(values["few_shot"], _fitting_examples(values))
    config = config_type(**{name: values[name] for name in names})
    if problems := [*_not_finite(config), *config.problems()]:
        raise one_error(UsageError, "These settings cannot work:", problems)
    return Parsed(config, frozenset(typed) & names)


def _fitting_examples(values: Mapping[str, Any]) -> int:
    asked = AskConfig(**{knob.name: values[knob.name] for knob in fields(AskConfig)})
    return len(worked_examples(asked.answer_format))


def _parser(config_type: type, about: str, recipe: dict[str, Any]) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program(), description=about, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below")
    parser.add_argument("--local_rank", type=int, default=0, help=SUPPRESS)  # the deepspeed launcher adds it
    for knob in fields(config_type):
        default = recipe.get(knob.name, knob.default)
        switch: dict[str, Any] = {"nargs": "?", "const": True} if knob.type in (bool, bool | None) else {}
        parser.add_argument(f"--{knob.name}", type=knob.type, default=default, help=knob.metadata["help"], **switch)
    return parser


def _check_secrets(argv: list[str], known: set[str]) -> None:
    """A key among the arguments stands in every process list, and is refused without being repeated."""
    named = [word.partition("=")[0] for word in argv if word.startswith("--") or "=" in word]
    secrets = [
        name[:40]
        for name in named
        if SECRET.fullmatch(name.lstrip("-"))
        and not difflib.get_close_matches(
            name.lstrip("-").replace("-", "_"), known, cutoff=0.9
        )  # a known flag mistyped
    ]
    if secrets:
        raise UsageError(
            f"{', '.join(secrets)}: keys and tokens are not taken as arguments, which every user here can read.\n"
            "Take this one for known and replace it. Set the new one in the environment (WANDB_API_KEY, HF_TOKEN),\n"
            "or let the tools keep it: `wandb login`, `hf auth login`."
        )


def _check_names(argv: list[str], known: set[str]) -> None:
    """A mistyped flag names the nearest real one; all of them in one error."""
    given = [word[2:].split("=")[0] for word in argv if word.startswith("--") and len(word) > 2]
    problems = []
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            problems.append(f"--{name}: did you mean --{close[0]}?" if close else f"--{name} is no flag of this script")
    if problems:
        raise one_error(UsageError, "Unknown flags:", problems, "--help lists them all.")


def _config_files(argv: list[str]) -> list[str]:
    followers = [value for word, value in pairwise(argv) if word == "--config"]
    return [*followers, *(word.partition("=")[2] for word in argv if word.startswith("--config="))]


def _check_file(file: str) -> None:
    """What the YAML reader lets pass or tells without the file's name; what else is wrong it tells itself."""
    try:
        root = yaml.compose(Path(file).read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UsageError(f"--config {file} is not UTF-8 text: {byte}.\nSave it as UTF-8, unpacked.") from None
    except RecursionError:
        raise UsageError(f"--config {file} is nested too deeply; settings stand one a line: num_steps: 40") from None
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {file} holds no settings; they stand one a line: num_steps: 40")
    counts = Counter(str(name.value) for name, _ in root.value)
    if twice := [f"{name} stands there {count} times; keep one" for name, count in counts.items() if count > 1]:
        raise one_error(UsageError, f"--config {file}:", twice)


def _not_finite(config: AskConfig) -> list[str]:
    """Numbers that no bound holds back: every comparison with NaN is false."""
    values = {knob.name: getattr(config, knob.name) for knob in fields(config)}
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return [f"{name} is {value}; it must be a number" for name, value in numbers.items() if not isfinite(value)]


def _shortened(message: str, known: set[str]) -> str:
    """jsonargparse's message in five lines, with the choices of a Literal in plain words and a likely name."""
    if unknown := re.fullmatch(r"Option '(\S+)' is not accepted", message.strip()):
        close = difflib.get_close_matches(unknown[1], known, n=1)
        message = f"The --config file: {unknown[1]} is no flag{f'; did you mean {close[0]}?' if close else ''}"
    for choices in (ReferenceKind, LossType, KlEstimator, RewardScale, OnRewardError):
        message = message.replace(str(choices), " | ".join(get_args(choices)))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n".join([*(line[:200] for line in lines[:5]), "--help lists every flag and its default."])
