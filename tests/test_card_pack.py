"""benchmarks/card_pack.py: a folder for a machine without a network. Nothing is downloaded here."""

import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import card_pack  # noqa: E402

USES_ITS_CPU_LIBRARY = """
import bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
values = torch.linspace(-1, 1, 64)
assert (dequantize_4bit(*quantize_4bit(values)) - values).abs().max() < 0.2
assert "Mock" not in type(bitsandbytes.cextension.lib).__name__  # it would stand for a library that was not found
print(bitsandbytes.__file__)
"""


@pytest.fixture
def wheel(tmp_path):
    """The wheel of bitsandbytes, made again from what is installed."""
    installed = distribution("bitsandbytes")
    made = tmp_path / f"bitsandbytes-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file in installed.files or ():
            if "__pycache__" not in file.parts and ".." not in file.parts:
                archive.write(file.locate(), str(file))
    return made


def test_a_reduced_bitsandbytes_works_on_a_cpu_and_its_record_names_what_it_holds(wheel, tmp_path):
    before = wheel.stat().st_size
    card_pack.reduce(wheel, "130")
    assert wheel.stat().st_size < before / 5
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
        archive.extractall(tmp_path / "site")
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda130")}
    assert names <= recorded and libraries == {name for name in recorded if name.endswith(".so")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}){USES_ITS_CPU_LIBRARY}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path / "site")), done.stderr


def test_a_cuda_version_that_bitsandbytes_lacks_is_named(wheel):
    with pytest.raises(SystemExit, match="no library for cuda999"):
        card_pack.reduce(wheel, "999")


def test_the_pack_holds_what_setup_cfg_asks_for_and_what_that_needs():
    names = card_pack.needed(card_pack.root_requirements())
    assert {"deepspeed", "transformers", "tokenizers", "hjson", "pydantic-core", "pytest"} <= names
    assert not names & (card_pack.THERE | card_pack.LEFT_OUT | {"triton", "sympy", "pillow"})


def test_every_version_of_the_pack_is_pinned():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    assert card_pack.needed(card_pack.root_requirements()) | set(card_pack.BESIDE) <= pinned
