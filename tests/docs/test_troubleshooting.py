"""docs/troubleshooting.md and not_learning.md quote messages exactly, so that a search for one finds it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "not_learning.md")]
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", "\n".join(PAGES), re.M | re.S)  # a language: commands and files
QUOTED = [line.strip() for language, block in BLOCKS if not language for line in block.splitlines()]
SHORTEST = 9  # letters of a piece that identifies a message


def source() -> str:
    """Return the package's text with adjacent string literals joined, as Python does."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "grpo_ds").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.fixture(scope="module")
def package() -> str:
    return source()


def pieces(line: str) -> list[str]:
    """Return the texts between the places left open."""
    return [piece for part in line.split("...") if len(piece := part.strip(" .")) >= SHORTEST]


@pytest.mark.parametrize("line", QUOTED)
def test_a_quoted_message_is_one_of_ours(package, line):
    assert pieces(line) and [piece for piece in pieces(line) if piece not in package] == []


def test_the_pages_quote_messages():
    assert len(QUOTED) > 20
