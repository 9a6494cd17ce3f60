"""docs/troubleshooting.md quotes messages exactly, so that a search for one finds it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", PAGE, re.M | re.S)  # blocks with a language are commands and files
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


def test_the_page_quotes_messages():
    assert len(QUOTED) > 20


def test_every_link_within_the_page_leads_somewhere():
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    assert [link for link in re.findall(r"\]\(#([\w-]+)\)", PAGE) if link not in headings] == []
