"""The wheel is complete: in an environment of its own, far from the checkout, it plans, selects and trains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "wandb")
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
# pip's own isolation would download setuptools for each build.
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
OWN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip, too, would read it


def run(*words, **options):
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, env=OWN, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Two wheels: from the sources as they stand here, and from a source distribution."""
    folder = tmp_path_factory.mktemp("built")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=LEFT_OUT)  # a build writes beside them
    run(*PIP, "wheel", *OFFLINE, "-w", folder / "direct", sources)
    run(sys.executable, "-c", SDIST, folder, cwd=sources)
    (sdist,) = folder.glob("*.tar.gz")
    run(*PIP, "wheel", *OFFLINE, "-w", folder / "from_sdist", sdist)
    return [next((folder / way).glob("*.whl")) for way in ("direct", "from_sdist")]


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """Function that runs a command of an environment that has the wheel, in a folder of its own.

    The other packages are those of this environment, behind its own. Their .pth files, such as the one of
    `pip install -e`, are not read there.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    run(*PIP, "--python", folder / "venv/bin/python", "install", "--no-index", "--no-deps", wheels[1])
    environment = OWN | {
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    (folder / "work").mkdir()

    def command(name, *words, code=0):
        result = subprocess.run(
            [folder / "venv/bin" / name, *map(str, words)],
            cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout + result.stderr

    command.folder = folder
    return command


def test_a_wheel_holds_every_file_of_the_package_and_of_the_shipped_folders(wheels):
    package = {
        f"{prefix}{path.relative_to(ROOT)}"
        for folder, prefix in (("grpo_ds", ""), ("ds_configs", "grpo_ds/"), ("configs", "grpo_ds/"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for wheel in wheels:
        names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert names == package


def test_the_package_comes_from_the_wheel(installed):
    where = installed("python", "-c", "import grpo_ds; print(grpo_ds.__file__)").strip()
    assert Path(where).is_relative_to(installed.folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "zero2.json: RAM"),
        ("--ds zero2_lowram.json", "zero2_lowram.json: RAM"),
        ("--ds ds_configs/zero2_lowram.json", "ds_configs/zero2_lowram.json: RAM"),
        ("--config smollm2-laptop.yaml", "smollm2-135m"),
        ("--config=configs/smollm2-laptop.yaml", "smollm2-135m"),
    ],
)
def test_shipped_files_are_found_by_name(installed, flags, words):
    assert words in installed("grpo-ds", "train", "--plan", *flags.split())


def test_an_unknown_name_gets_the_shipped_ones(installed):
    for flag, shipped in (("--ds", "ds_configs/zero2.json"), ("--config", "configs/smollm2-laptop.yaml")):
        assert shipped in installed("grpo-ds", "train", flag, "none", code=2)


def test_select_names_a_command(installed):
    assert "Run: grpo-ds train --model" in installed("grpo-ds", "select", "--gpu_gib", 24, "--ram_gib", 32)


def test_it_trains_two_steps_with_the_compiled_optimizer(installed, tiny_folder):
    flags = "--ds zero2.json --num_steps 2 --num_generations 2 --batch_size 1 --max_prompt_length 480 --eval_limit 2"
    words = f"--model {tiny_folder} --output_dir run --max_completion_length 4 {flags}".split()
    output = installed("grpo-ds", "train", *words)
    assert f"Ask it: grpo-ds ask --model {installed.folder / 'work/run'}" in output
    steps = (installed.folder / "work/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    assert list((installed.folder / "compiled").rglob("*adamw8bit*"))
