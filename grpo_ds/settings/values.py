"""Reading of what a user wrote for a flag, on the command line or in YAML, as the flag's value.

The flag's type alone decides how a text is read: `labels: [yes, no]`, `answer_tag: on` and `output_dir: 1e3` stay the
words that were written, which YAML alone would make true, false and 1000.0. Paths become absolute here, wherever they
come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field
from math import isfinite
from types import NoneType
from typing import Any, Literal, get_args, get_origin

# A text; a list of what was written; None for null or nothing; a mapping, which no flag takes.
Written = str | list[Any] | None | dict[str, Any]
SHOWN = 60  # characters of a text that a message repeats
TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),  # as YAML and transformers' parser read them
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


def may_be_null(flag: "Field[Any]") -> bool:
    return NoneType in get_args(flag.type)


def kind_of(flag: "Field[Any]") -> Any:
    """Return the flag's type without None: bool, int, float, str or a Literal."""
    return next(kind for kind in get_args(flag.type) if kind is not NoneType) if may_be_null(flag) else flag.type


def is_listed(flag: "Field[Any]") -> bool:
    """True if the flag's text is a list, separated by commas."""
    return bool(flag.metadata.get("listed"))


def expected(flag: "Field[Any]") -> str:
    """Describe the values of the flag, for messages."""
    kind = kind_of(flag)
    if get_origin(kind) is Literal:
        text = f"one of {', '.join(get_args(kind))}"
    elif is_listed(flag):
        text = "a list of texts without a comma, or one comma-separated text" + (
            f", such as {flag.default}" if flag.default else ""
        )
    else:
        text = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}[kind]
    return f"{text}, or null" if may_be_null(flag) else text


def read_values(flags: "Mapping[str, Field[Any]]", written: Mapping[str, Written]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the flags by name, and a message for each that cannot be read."""
    values, problems = {}, []
    for name, its in written.items():
        try:
            values[name] = _read(flags[name], its)
        except (ValueError, KeyError):
            problems.append(f"{name} is {_shown(its)}; it must be {expected(flags[name])}")
    return values, problems


def _read(flag: "Field[Any]", written: Written) -> Any:
    """Return the flag's value. Raises ValueError or KeyError if it cannot be one."""
    if written is None and may_be_null(flag):
        return None
    text = _joined(written) if is_listed(flag) else written
    if not isinstance(text, str) or not (text or flag.default == "" or flag.metadata.get("may_be_empty")):
        raise ValueError
    kind = kind_of(flag)
    if get_origin(kind) is Literal:
        return {choice: choice for choice in get_args(kind)}[text]
    if kind in (int, float) and not text.isascii():
        raise ValueError  # Python reads the digits of every script
    as_text: Callable[[str], str] = flag.metadata.get("path", str)
    readers: dict[Any, Callable[[str], Any]] = {str: as_text, int: int, float: _finite, bool: _switch}
    return readers[kind](text)


def _switch(text: str) -> bool:
    return TRUTH[text.lower()]


def _finite(text: str) -> float:
    """Read a number; NaN and infinity would pass the checks of sizes, for every comparison with NaN is false."""
    if not isfinite(number := float(text)):
        raise ValueError
    return number


def _joined(written: Written) -> Written:
    """Return a list, or a text such as "yes, no" or '["yes", "no"]', as its items with a comma between them."""
    if isinstance(written, str):
        bracketed = written.startswith("[") and written.endswith("]")
        items = written[1:-1].replace('"', "").replace("'", "").split(",") if bracketed else written.split(",")
    elif isinstance(written, list) and all(isinstance(item, str) and "," not in item for item in written):
        items = written
    else:
        return None  # with null or a list in it; an item with a comma would become two
    return ",".join(item.strip() for item in items)


def _shown(written: Written) -> str:
    """Show what was written, except a mapping, which may hold a secret."""
    if isinstance(written, str) and written:
        return repr(written[:SHOWN])
    if isinstance(written, list) and written:
        return f"[{', '.join(map(_shown, written))}]"[:SHOWN]
    if isinstance(written, dict):
        return "a mapping"
    return "null or blank" if written is None else "empty"
