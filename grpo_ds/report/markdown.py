"""Texts of users, files and models in Markdown, escaped so that no renderer interprets them."""

import re
from collections.abc import Sequence
from typing import Any

from grpo_ds.terminal import escape_control_chars

# Syntax within a line: code, emphasis, links, images, cells, formulas. A _ within a word has no meaning.
SYNTAX = re.compile(r"([\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_]))")
HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(value: Any) -> str:
    """Return one line that a renderer shows unchanged; None is empty, a float has four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return SYNTAX.sub(r"\\\1", " ".join(escape_control_chars(str(value)).split()).translate(HTML))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of plain cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else plain(cell) for cell in line) + " |" for line in lines
    )


def fenced(text: str, language: str = "") -> str:
    """Return a code block with a fence longer than any fence in the text."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{escape_control_chars(text).rstrip()}\n{fence}"
