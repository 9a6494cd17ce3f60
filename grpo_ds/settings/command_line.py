"""Command line and YAML to a checked config, with errors of at most six lines.

`parse` reads argv once and refuses unknown flags, unreadable values and secrets. The defaults are known later (a model
or a checkpoint has a recipe), so `Parsed.config(recipe)` builds and checks the config.
Nothing heavy is imported here, so `--help` and a mistyped flag are answered at once.
"""

import difflib
import re
import sys
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import yaml

from grpo_ds.errors import UsageError, one_error
from grpo_ds.settings.config import AskConfig
from grpo_ds.settings.config_file import read_settings
from grpo_ds.settings.flags import Flags, all_flags, failed, flags_by_heading
from grpo_ds.settings.saved_config import with_copied_prompt
from grpo_ds.settings.shipped import CONFIGS
from grpo_ds.settings.values import Written, is_listed, kind_of, may_be_null, read_values
from grpo_ds.system.invocation import program
from grpo_ds.task.rewards import BARE_LABEL
from grpo_ds.task.worked_examples import worked_examples

ConfigType = TypeVar("ConfigType", bound=AskConfig)
SECRET = re.compile(r"[\w-]*(api_?key|token|secret|passw(or)?d)|([\w-]*[_-])?key", re.IGNORECASE)
OWN = ("help", "config", "print_config", "local_rank")  # of no group; the deepspeed launcher adds --local_rank
LENGTHS = ("num_steps", "max_steps", "num_train_epochs")  # flags that say how long a run is
REMEDY = "Correct it or leave it out; --help lists every flag and its default."


@dataclass(frozen=True)
class Parsed(Generic[ConfigType]):
    """Flags that the user gave, on the command line and in its YAML file; types are checked, values not yet.

    Example:
        parse(TrainConfig, ["--beta", "0"], about="").config({"few_shot": 2})  # beta typed, few_shot from a recipe
    """

    config_type: type[ConfigType]
    given: Mapping[str, Any]  # flag -> value

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
        if problems := [*config.problems(), *self._length_problems(config)]:
            resumed = self.given.get("resume_from_checkpoint")
            where = " in a resumed run; what is not typed comes from its checkpoint" if resumed else ""
            raise one_error(UsageError, f"These settings cannot work{where}:", problems)
        return config

    def unchecked(self, recipe: Mapping[str, Any] | None = None, **decided: Any) -> ConfigType:
        """Build the config without checking its values, to find out which recipe applies.

        A value that is wrong with the defaults may be right with the recipe.
        """
        flags, recipe = all_flags(self.config_type), recipe or {}
        own = {flag.name: recipe[flag.name] for flag in flags if flag.name in recipe}
        values: dict[str, Any] = {flag.name: flag.default for flag in flags} | own | {**self.given, **decided}
        values |= self._suited({name: values[name] for name in own if name not in self.given}, values)
        if values.get("max_steps") is not None:
            values |= {"num_steps": values["max_steps"], "max_steps": None}
        return self.config_type(**values)

    def _suited(self, recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those flags of the recipe that other flags change: the kind of the answers, a warm-up of their own."""
        suited = {}
        if "few_shot" in recipe:  # the examples that fit the answers
            suited["few_shot"] = min(recipe["few_shot"], _fitting_examples(values))
        if "prefill" in recipe and values["answers"] == "none":
            suited["prefill"] = False  # no answer is read, so none is begun
        if "reward_funcs" in recipe and values["answers"] != "labels":
            named = recipe["reward_funcs"].split(",")
            suited["reward_funcs"] = ",".join(name for name in named if name != BARE_LABEL)
        if "warmup_steps" in recipe and "warmup_ratio" in self.given:
            suited["warmup_steps"] = 0
        return suited

    def _length_problems(self, config: ConfigType) -> list[str]:
        """Report a run whose length is said twice, or in all where it is the length of an iteration."""
        said = [name for name in LENGTHS if self.given.get(name) is not None]
        several = "max_steps" in said and getattr(config, "num_iterations", 1) > 1
        return failed(
            (len(said) > 1, f"{' and '.join(said)} both say how long the run is: keep one"),
            (several, "max_steps is for one iteration; with num_iterations write num_steps, the steps of each"),
        )


def parse(config_type: type[ConfigType], argv: list[str], *, about: str) -> Parsed[ConfigType]:
    """Read argv and its --config files; what is typed wins. Raises UsageError for all that cannot be read.

    --help and --print_config print, and exit.
    """
    flags = {flag.name: flag for flag in all_flags(config_type)}
    _check_secrets(argv, {*flags})
    words = _words(argv)
    if "help" in words or "-h" in argv:
        _help_page(config_type, about).print_help()
        sys.exit()
    _check_names(words, {*flags, *OWN})
    given: dict[str, Any] = {}
    for file in map(CONFIGS.find, words.get("config", ())):
        values, problems = read_settings(file, [*flags.values()], strict=True)
        if problems:
            raise one_error(UsageError, f"--config {file}:", problems, REMEDY)
        given |= with_copied_prompt(values, file)
    typed, problems = read_values(flags, {name: _as_typed(flags[name], words[name]) for name in words if name in flags})
    if problems:
        raise one_error(UsageError, "These flags cannot be read:", problems, REMEDY)
    if any(name in typed for name in LENGTHS):
        given = {name: value for name, value in given.items() if name not in LENGTHS}
    parsed = Parsed(config_type, given | typed)
    if "print_config" in words:
        config = parsed.unchecked()
        print(yaml.safe_dump({name: getattr(config, name) for name in flags}, sort_keys=False), end="")
        sys.exit()
    return parsed


def _words(argv: list[str]) -> dict[str, list[str]]:
    """Return the words behind each flag, by its name; words before the first flag under "". The last of a flag counts.

    A word that begins with two dashes is a flag, so that -1,0.5 is a value.
    """
    words: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if not word.startswith("--") or word == "--":
            words.setdefault(name, []).append(word)
            continue
        name, equals, value = word[2:].partition("=")
        earlier = words.get(name, []) if name == "config" else []
        words[name] = [*earlier, *([value] if equals else [])]
    return words


def _as_typed(flag: "Field[Any]", words: list[str]) -> Written:
    """Return what the words behind a flag say: a switch alone is true, and a list may be typed item by item."""
    if not words:
        return "true" if kind_of(flag) is bool else []
    if is_listed(flag):
        words = [",".join(word.removesuffix(",") for word in words)]
    if len(words) > 1:
        return [*words]
    return None if words == ["null"] and may_be_null(flag) else words[0]


def _help_page(config_type: type[Flags], about: str) -> ArgumentParser:
    """Return a parser that only prints --help."""
    parser = ArgumentParser(
        prog=program(), usage="%(prog)s [options]", description=about, formatter_class=OneColumn, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the flags below; a typed flag wins")
    parser.add_argument("--print_config", action="store_true", help="print all settings as such a file, and exit")
    for heading, flags in flags_by_heading(config_type).items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            optional: dict[str, Any] = {"nargs": "?"} if kind_of(flag) is bool else {}
            group.add_argument(f"--{flag.name}", help=_help(flag), metavar=_metavar(flag), **optional)
    return parser


class OneColumn(HelpFormatter):
    """Formatter of --help that starts all texts in one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill each paragraph by itself, and leave indented ones, which are commands, as they are."""
        fill = super()._fill_text
        return "\n\n".join(it if it.startswith(" ") else fill(it, width, indent) for it in text.split("\n\n"))


def _help(flag: "Field[Any]") -> str:
    """Line of --help for the flag, with its default unless that is empty, false or already in the line."""
    meaning, default = flag.metadata["help"], "true" if flag.default is True else flag.default
    plain = default in (None, "") or default is False or "default:" in meaning
    return (meaning if plain else f"{meaning} (default: {default})").replace("%", "%%")


def _metavar(flag: "Field[Any]") -> str:
    """Allowed values of the flag, for --help."""
    kind = kind_of(flag)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}[kind]


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


def _check_names(words: Mapping[str, list[str]], known: set[str]) -> None:
    """Report all mistyped flags in one error, each with the most similar real flag."""
    problems = [f"{word}: belongs to no flag; write --NAME VALUE" for word in words.get("", ())]
    for name in words:
        if name and name not in known:
            close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            guess = f"did you mean --{close[0]}?" if close else "this command has no such flag"
            problems.append(f"--{name}: {guess}")
    if words.get("config") in ([], [""]):
        problems.append("--config names no file")
    if problems:
        raise one_error(UsageError, "Unknown flags:", problems, "--help lists them all.")
