"""A flag, and a group of flags: the base of everything in data_flags.py, grpo_flags.py and run_flags.py."""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from grpo_ds.settings.paths import absolute

# Order of the headings in --help and in a written config; headings that only one command has come before them.
HEADINGS = (
    *("model", "data", "prompt", "rollouts", "rewards", "loss", "optimizer"),
    *("reference", "adapter", "memory", "output", "safety"),
)


def flag(default: Any, meaning: str, **more: Any) -> Any:
    """Declare a flag: a field with its default and its line of --help. more: may_be_empty, "" is not a mistake."""
    return field(default=default, metadata={"help": meaning, **more})


def list_flag(default: str | None, meaning: str, **more: Any) -> Any:
    """Declare a flag of texts separated by commas; YAML and the command line may also give them one by one."""
    return field(default=default, metadata={"help": meaning, "listed": True, **more})


def path_flag(default: str | None, meaning: str, *, path: Callable[[str], str] = absolute, **more: Any) -> Any:
    """Declare a flag that names a file or a folder. path: makes it absolute (settings/paths.py). more: as of `flag`."""
    return field(default=default, metadata={"help": meaning, "path": path, **more})


def failed(*checks: tuple[bool, str]) -> list[str]:
    """Return the messages of failed checks; a check is (failed, message)."""
    return [message for wrong, message in checks if wrong]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Base of every group and config.

    A group is a dataclass with a heading, its flags, and `problems`. A config inherits from its groups, so that
    `config.beta` is a plain attribute.
    """

    heading: ClassVar[str] = ""

    def __new__(cls, **given: Any) -> "Flags":
        """Note which flags were given, for `given_flags`."""
        self = super().__new__(cls)
        vars(self)["_given"] = frozenset(given)
        return self

    @property
    def given_flags(self) -> dict[str, Any]:
        """The flags that were given when this was made, which no recipe may replace.

        dataclasses.replace gives all of them: then those that differ from their defaults.
        """
        named, defaults = vars(self)["_given"], {flag.name: flag.default for flag in fields(self)}
        values = {name: getattr(self, name) for name in defaults if name in named}
        if len(values) < len(defaults):
            return values
        return {name: value for name, value in values.items() if value != defaults[name]}

    def problems(self) -> list[str]:
        """Return a line per problem: a subclass adds its own to those of super()."""
        return []


def flags_by_heading(config_type: type[Flags]) -> "dict[str, list[Field[Any]]]":
    """Return heading -> its flags, both in the order of --help."""
    groups: dict[str, list[Field[Any]]] = {}
    for group in config_type.__mro__:
        if issubclass(group, Flags):
            inherited = {it.name for base in group.__bases__ if is_dataclass(base) for it in fields(base)}
            if own := [it for it in fields(group) if it.name not in inherited]:
                groups.setdefault(group.heading, []).extend(own)
    order = {heading: place for place, heading in enumerate(HEADINGS)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], -1)))


def all_flags(config_type: type[Flags]) -> "list[Field[Any]]":
    """Return the flags of a config, in the order of --help."""
    return [flag for group in flags_by_heading(config_type).values() for flag in group]
