"""Make the folder that `make card` needs on a machine without a network: wheels, and smollm2's tokenizer and config.

For Linux on x86-64 with torch for CUDA, numpy and matplotlib, which would not fit 60 MiB. The versions are those of
constraints.txt. DeepSpeed's wheel is built from its source; bitsandbytes keeps its CPU library and one of CUDA's.
On the other machine:

    python3 -m pip install --no-index --no-deps --target site dist/card-pack/*.whl && export PYTHONPATH=$PWD/site

    python benchmarks/card_pack.py [--python 3.12] [--cuda 130]
"""

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from random_weights import PACKED, ROOT

MOST = 60 * 2**20  # bytes
THERE = {"torch", "numpy", "matplotlib"}  # on the other machine, with what they need
# Not needed by card.py: a tracker, the hub's downloads, and what only datasets needs (so stage 6 wants them there).
LEFT_OUT = {"wandb", "hf-xet", "pandas", "pyarrow"}
ALSO = ("pytest", "beartype")  # stage 2 runs tests
BESIDE = ("trl", "liger-kernel")  # stages 5 and 6; what they need is ours
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_5")  # glibc; pip takes only what is named
TOKENIZER = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of python there (default 3.12)")
    parser.add_argument("--cuda", default="130", help="version of CUDA there, without its point (default 130)")
    arguments = parser.parse_args()
    from grpo_ds.models.embedded import embedded_folder

    folder = PACKED.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fetch(folder, arguments.python)
    (wheel,) = folder.glob("bitsandbytes-*.whl")
    reduce(wheel, arguments.cuda)
    PACKED.mkdir()
    for name in TOKENIZER:
        shutil.copy(embedded_folder() / name, PACKED)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB of at most {MOST / 2**20:.0f}")
    sys.exit(size > MOST)


def fetch(folder: Path, python: str) -> None:
    """Download the wheels; build DeepSpeed's, which has none."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    quiet = ["--no-deps", "-c", str(ROOT / "constraints.txt")]
    foreign = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    foreign += [word for number in PLATFORMS for word in ("--platform", f"manylinux_{number}_x86_64")]
    foreign += [word for name in ("manylinux2014", "manylinux1") for word in ("--platform", f"{name}_x86_64")]
    names = sorted(needed(root_requirements()) - {"deepspeed"}) + list(BESIDE)
    subprocess.run([*pip, "download", *quiet, *foreign, "-d", str(folder), *names], check=True)
    subprocess.run([*pip, "wheel", *quiet, "-w", str(folder), "deepspeed"], check=True)


def root_requirements() -> list[str]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [*setup["options"]["install_requires"].split("\n"), *ALSO]


def needed(requirements: Iterable[str]) -> set[str]:
    """Return the names of all packages that these need, by what is installed here, without THERE and LEFT_OUT."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    open_ones = [text for text in requirements if text.strip()]
    while open_ones:
        requirement = Requirement(open_ones.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in found | THERE | LEFT_OUT:
            continue
        found.add(name)
        try:
            open_ones += requires(name) or []
        except PackageNotFoundError:
            sys.exit(f"{name} is not installed here, so what it needs is unknown: make install")
    return found


def reduce(wheel: Path, cuda: str) -> None:
    """Leave only the CPU's library and that of one CUDA version in bitsandbytes' wheel."""
    keep, smaller = {"cpu", f"cuda{cuda}"}, wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        libraries = {match[1] for name in old.namelist() if (match := LIBRARY.search(name))}
        if not keep <= libraries:
            sys.exit(f"{wheel.name} has no library for {', '.join(keep - libraries)}; it has {sorted(libraries)}")
        for item in old.infolist():
            if (match := LIBRARY.search(item.filename)) and match[1] not in keep:
                continue
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = b"".join(line for line in content.splitlines(True) if is_kept(line.decode(), keep))
            new.writestr(item, content, zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def is_kept(line: str, keep: set[str]) -> bool:
    match = LIBRARY.search(line.partition(",")[0])
    return match is None or match[1] in keep


if __name__ == "__main__":
    main()
