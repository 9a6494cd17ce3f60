"""The pictures of docs/how_it_works.md: the script draws them, and each names its parts."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PARTS = {
    "step": ["GPU memory", "RAM", "Sample", "Rewards", "Advantages", "Packed row", "Reference", "Loss", "AdamW"],
    "packed_row": ["prompt", "c1", "c8", "888 tokens", "3,584 tokens"],  # 384 + 8 x 63 and 8 x 448
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, DOCS / "pictures.py", folder], check=True, timeout=120)
    return folder


def words_of(svg: Path) -> str:
    return "\n".join(text for text in ElementTree.parse(svg).getroot().itertext() if text.strip())


@pytest.mark.parametrize("name", PARTS)
def test_the_script_draws_a_picture_that_names_its_parts(drawn, name):
    assert [part for part in PARTS[name] if part not in words_of(drawn / f"{name}.svg")] == []


@pytest.mark.parametrize("name", PARTS)
def test_the_picture_in_docs_is_the_one_the_script_draws(drawn, name):
    """Compare the words: another matplotlib may draw other lines."""
    own = [words_of(folder / f"{name}.svg").splitlines() for folder in (DOCS, drawn)]
    own = [[line for line in lines if "matplotlib" not in line.lower()] for lines in own]
    assert own[0] == own[1]


@pytest.mark.parametrize("name", PARTS)
def test_a_picture_has_its_own_background_and_loads_nothing_from_elsewhere(name):
    text = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert "fill: #ffffff" in text and "<image" not in text and "@import" not in text
    assert f"{name}.svg" in (DOCS / "how_it_works.md").read_text(encoding="utf-8")
