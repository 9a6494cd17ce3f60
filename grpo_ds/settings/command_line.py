"""Command line and YAML to a checked config, by jsonargparse, with errors of at most six lines.

`parse` reads argv once and refuses unknown flags, wrong types and secrets. The defaults are known later (a model or a
checkpoint has a recipe), so `Parsed.config(recipe)` builds and checks the config.
Nothing heavy is imported here, so `--help` and a mistyped flag are answered at once.
"""

import difflib
import re
from argparse import SUPPRESS, HelpFormatter
from collections import Counter
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from itertools import pairwise
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from grpo_ds.core.objective import KlEstimator, LossType, RewardScale
from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.flags import Flags, all_flags, flags_by_heading
from grpo_ds.settings.grpo_flags import ReferenceKind
from grpo_ds.settings.shipped import CONFIGS
from grpo_ds.system.invocation import program
from grpo_ds.task.own_rewards import CompletionFormat
from grpo_ds.task.prompts import worked_examples
from grpo_ds.task.scoring import OnRewardError

ConfigType = TypeVar("ConfigType", bound=AskConfig)
SECRET = re.compile(r"[\w-]*(api_?key|token|secret|passw(or)?d)|([\w-]*[_-])?key", re.IGNORECASE)
PRINT_CONFIG = "--print_config"


@dataclass(frozen=True)
class Parsed(Generic[ConfigType]):
    """Flags that the user gave, on the command line and in its YAML file; types are checked, values not yet.

    Example:
        parse(TrainConfig, ["--beta", "0"], about="").config({"few_shot": 2})  # beta typed, few_shot from a recipe
    """

    config_type: type[ConfigType]
    given: Mapping[str, Any]  # flag -> value
    parser: ArgumentParser

    @property
    def typed(self) -> frozenset[str]:
        """Names of the given flags, which no default and no recipe may replace."""
        return frozenset(self.given)

    def config(self, recipe: Mapping[str, Any] | None = None, **decided: Any) -> ConfigType:
        """Build the config from defaults < recipe < given < decided. Raises one UsageError for all problems.

        recipe: defaults that suit the model, or the flags of a checkpoint; flags of other commands are skipped.
        decided: flags that the command itself sets, such as the model that "auto" stands for.
        """
        config = self.unchecked(recipe, **decided)
        if problems := [*_not_finite(config), *config.problems()]:
            raise one_error(UsageError, "These settings cannot work:", problems)
        return config

    def unchecked(self, recipe: Mapping[str, Any] | None = None, **decided: Any) -> ConfigType:
        """Build the config without checking its values, to find out which recipe applies.

        A value that is wrong with the defaults may be right with the recipe. Raises UsageError for wrong types.
        """
        flags, recipe = all_flags(self.config_type), recipe or {}
        own = {flag.name: recipe[flag.name] for flag in flags if flag.name in recipe}
        values: dict[str, Any] = {flag.name: flag.default for flag in flags}
        values |= _converted(self.parser, own)
        values |= {**self.given, **decided}
        if empty := [flag.name for flag in flags if values[flag.name] is None and not _may_be_none(flag)]:
            raise UsageError(f"{', '.join(empty)} cannot be null: give a value, or leave it out.")
        if "few_shot" in own and "few_shot" not in self.given:  # the recipe's examples that fit the labels
            values["few_shot"] = min(values["few_shot"], _fitting_examples(values))
        return self.config_type(**values)


def parse(config_type: type[ConfigType], argv: list[str], *, about: str) -> Parsed[ConfigType]:
    """Read argv and its --config file. Raises UsageError for unknown flags, wrong types and secrets."""
    names = {flag.name for flag in all_flags(config_type)}
    _check_secrets(argv, names)
    parser = _parser(config_type, about)
    _check_names(argv, {*names, "config", PRINT_CONFIG.lstrip("-"), "local_rank", "help"})
    argv = _with_found_files(argv)
    for file in _config_files(argv):
        _check_file(file)
    printing = any(word.startswith(PRINT_CONFIG) for word in argv)  # prints all values, also defaults, and exits
    try:
        given = parser.parse_args(argv, defaults=printing).as_dict()
    except (ArgumentError, ValueError, OSError) as error:
        raise UsageError(_shortened(str(error), names)) from None
    return Parsed(config_type, {name: value for name, value in given.items() if name in names}, parser)


def _parser(config_type: type[Flags], about: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program(),
        usage="%(prog)s [options]",
        description=about,
        formatter_class=OneColumn,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the flags below")
    parser.add_argument("--local_rank", type=int, default=0, help=SUPPRESS)  # the deepspeed launcher adds it
    for heading, flags in flags_by_heading(config_type).items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            switch: dict[str, Any] = {"nargs": "?", "const": True} if flag.type in (bool, bool | None) else {}
            shown: dict[str, Any] = {"help": _help(flag), "metavar": _metavar(flag.type)}
            group.add_argument(f"--{flag.name}", type=flag.type, default=flag.default, **shown, **switch)
    return parser


class OneColumn(HelpFormatter):
    """Formatter of --help that starts all texts in one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _help(flag: "Field[Any]") -> str:
    """Line of --help for the flag, with its default unless that is empty, false or already in the line."""
    meaning, default = flag.metadata["help"], "true" if flag.default is True else flag.default
    plain = default in (None, "") or default is False or "default:" in meaning
    return (meaning if plain else f"{meaning} (default: {default})").replace("%", "%%")


def _metavar(kind: Any) -> str:
    """Allowed values of a type, for --help."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    names: dict[Any, str] = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    return next(name for type_, name in names.items() if type_ in (kind, *get_args(kind)))


def _may_be_none(flag: "Field[Any]") -> bool:
    return NoneType in get_args(flag.type)


def _converted(parser: ArgumentParser, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the recipe's values to the types of their flags. Raises UsageError for a wrong type."""
    if not recipe:
        return {}
    try:
        return parser.parse_object(dict(recipe), defaults=False).as_dict()
    except (ArgumentError, ValueError) as error:
        message = _shortened(str(error), set(recipe), lines=4)
        raise UsageError(f"Settings saved with a model or a checkpoint cannot be used:\n{message}") from None


def _fitting_examples(values: Mapping[str, Any]) -> int:
    asked = AskConfig(**{flag.name: values[flag.name] for flag in fields(AskConfig)})
    return len(worked_examples(asked.answer_format))


def _check_secrets(argv: list[str], known: set[str]) -> None:
    """Refuse a key among the arguments, without printing it: every process list shows arguments."""
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
            f"{', '.join(secrets)}: keys and tokens are refused as arguments, which every user here can read.\n"
            "Treat this key as compromised and replace it. Set the new one in the environment (WANDB_API_KEY,\n"
            "HF_TOKEN), or let the tools store it: `wandb login`, `hf auth login`."
        )


def _check_names(argv: list[str], known: set[str]) -> None:
    """Report all mistyped flags in one error, each with the most similar real flag."""
    given = [word[2:].split("=")[0] for word in argv if word.startswith("--") and len(word) > 2]
    problems = []
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            guess = f"did you mean --{close[0]}?" if close else "this command has no such flag"
            problems.append(f"--{name}: {guess}")
    if problems:
        raise one_error(UsageError, "Unknown flags:", problems, "--help lists them all.")


def _with_found_files(argv: list[str]) -> list[str]:
    """Return argv with `--config PATH` for each `--config FILE` or `--config=FILE`: a shipped FILE needs no folder."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    return [str(CONFIGS.find(word)) if before == "--config" else word for before, word in pairwise(["", *words])]


def _config_files(argv: list[str]) -> list[str]:
    return [value for word, value in pairwise(argv) if word == "--config"]


def _check_file(file: str) -> None:
    """Report mistakes that jsonargparse accepts, or reports without the file's name."""
    try:
        root = yaml.compose(Path(file).read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UsageError(f"--config {file} is not UTF-8 text: {byte}.\nSave it as UTF-8, uncompressed.") from None
    except RecursionError:
        raise UsageError(f"--config {file} is nested too deeply; write one setting per line: num_steps: 40") from None
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {file} holds no settings; write one per line: num_steps: 40")
    counts = Counter(str(name.value) for name, _ in root.value)
    if twice := [f"{name} is set {count} times; keep one" for name, count in counts.items() if count > 1]:
        raise one_error(UsageError, f"--config {file}:", twice)


def _not_finite(config: AskConfig) -> list[str]:
    """Messages for NaN and infinity, which pass the other checks: every comparison with NaN is false."""
    values = {flag.name: getattr(config, flag.name) for flag in fields(config)}
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return [f"{name} is {value}; it must be a number" for name, value in numbers.items() if not isfinite(value)]


def _shortened(message: str, known: set[str], *, lines: int = 5) -> str:
    """Shorten jsonargparse's message to `lines`, with readable choices and the most similar flag."""
    if unknown := re.fullmatch(r"Option '(\S+)' is not accepted", message.strip()):
        close = difflib.get_close_matches(unknown[1], known, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        message = f"The --config file: unknown flag {unknown[1]}{guess}"
    message = re.sub(r'Parser key "(\S+)":', r"--\1:", message)
    for choices in (ReferenceKind, LossType, KlEstimator, RewardScale, OnRewardError, CompletionFormat):
        message = message.replace(str(choices), " | ".join(get_args(choices)))
    texts = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n".join([*(text[:200] for text in texts[:lines]), "--help lists every flag and its default."])
