"""RAM within a container's limit, the card's precision, and the versions of packages that training relies on."""

import os

import pytest
import torch

from grpo_ds.errors import MAX_LINES, PreflightError, UsageError
from grpo_ds.system import hardware
from grpo_ds.system.hardware import (
    cgroup_limit,
    check_versions,
    gpu_memory_gib,
    native_precision,
    ram_gib,
    requirements,
    version_problems,
)
from grpo_ds.system.ranks import World

GIB = 2**30


def limit(tmp_path, membership, files):
    """Return cgroup_limit for a mount with these files."""
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return cgroup_limit(tmp_path / "self", tmp_path / "mount")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"memory.max": 8 * GIB}, 8 * GIB),  # a container sees its own group as the root
        ("0::/a/b", {"a/memory.max": 4 * GIB, "a/b/memory.max": "max"}, 4 * GIB),  # the parent's limit holds
        ("0::/a/b", {"memory.max": 9, "a/memory.max": 7, "a/b/memory.max": 8}, 7),  # the tightest of all
        ("0::/", {"memory.max": "max"}, None),
        ("0::/gone", {}, None),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": 2 * GIB}, 2 * GIB),  # v1
        ("4:cpu,memory:/host/path", {"memory/memory.limit_in_bytes": 3 * GIB}, 3 * GIB),  # v1 in a container
        ("3:cpu:/x\n4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096}, 2**63 - 4096),  # v1's "no limit"
        ("0::/a\n4:memory:/", {"a/memory.max": 5, "memory/memory.limit_in_bytes": 6}, 5),  # both mounted
        ("", {"memory.max": 1}, None),
    ],
)
def test_the_tightest_limit_around_this_process(tmp_path, membership, files, expected):
    assert limit(tmp_path, membership, files) == expected


def test_without_proc_there_is_no_limit(tmp_path):
    assert cgroup_limit(tmp_path / "none", tmp_path) is None


def test_ram_is_never_more_than_the_limit(monkeypatch):
    unlimited = ram_gib()
    monkeypatch.setattr("grpo_ds.system.hardware.cgroup_limit", lambda: GIB // 2)
    assert ram_gib() == 0.5 < unlimited
    monkeypatch.setattr("grpo_ds.system.hardware.cgroup_limit", lambda: 2**62)  # v1 without a limit
    assert 0.5 < ram_gib() < 2**20


# --- cards ---------------------------------------------------------------------------------------------------


def cards(monkeypatch, tmp_path, *capabilities):
    """Pretend that nvidia-smi names these cards, of 16 GiB each."""
    smi = tmp_path / "nvidia-smi"
    lines = "\\n".join(capabilities)
    sizes = "\\n".join("16384" for _ in capabilities)
    smi.write_text(f'#!/bin/sh\ncase "$*" in *compute_cap*) printf "{lines}\\n";; *) printf "{sizes}\\n";; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        (["8.9"], "bf16"),  # RTX 40xx
        (["8.0"], "bf16"),  # A100
        (["7.5"], "fp16"),  # T4, RTX 20xx
        (["7.0"], "fp16"),  # V100
        (["9.0", "7.5"], "fp16"),  # all ranks compute alike, so the oldest card decides
        (["12.0"], "bf16"),  # not compared as text
        (["[N/A]"], "bf16"),  # training/precision.py asks torch as well
    ],
)
def test_a_card_computes_in_the_16_bits_that_it_has(monkeypatch, tmp_path, capabilities, precision):
    cards(monkeypatch, tmp_path, *capabilities)
    assert hardware.gpu_memory_gib() == 16
    assert native_precision(on_gpu=True) == precision


def test_an_old_card_is_refused_with_what_to_do(monkeypatch, tmp_path):
    cards(monkeypatch, tmp_path, "6.1")
    with pytest.raises(UsageError, match=r"capability 6\.1; the oldest .* is 7\.0") as error:
        native_precision(on_gpu=True)
    assert len(str(error.value).splitlines()) <= MAX_LINES and "CUDA_VISIBLE_DEVICES" in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.compute_capability() is None and native_precision(on_gpu=False) in ("bf16", "fp32")


# --- versions ------------------------------------------------------------------------------------------------


def installed(monkeypatch, **found):
    """Pretend that packages are installed in these versions."""
    real = hardware.version
    monkeypatch.setattr(hardware, "version", lambda name: found.get(name) or real(name))


def test_the_versions_here_pass():
    check_versions()
    assert "deepspeed>=0.19.6" in requirements()


@pytest.mark.parametrize("version", ["0.15.2", "0.18.9", "0.19.5"])
def test_a_deepspeed_that_loses_gradients_is_refused_with_the_reason(monkeypatch, version):
    installed(monkeypatch, deepspeed=version)
    reason = f"deepspeed {version}, but >=0.19.6 is needed: before 0.19.0 it silently lost"
    with pytest.raises(PreflightError, match=reason):
        check_versions()


def test_several_at_once_and_builds_of_a_right_version_pass(monkeypatch):
    installed(monkeypatch, torch="2.7.1+cu126", bitsandbytes="0.45.0")
    with pytest.raises(PreflightError) as error:
        check_versions()
    assert "torch 2.7.1+cu126" in str(error.value) and "bitsandbytes 0.45.0" in str(error.value)
    installed(monkeypatch, torch="2.11.0+cu128", bitsandbytes="0.51.0.dev0", deepspeed="0.20.0rc1")
    check_versions()


def test_packages_that_are_missing_or_belong_to_an_extra_are_skipped(monkeypatch):
    wanted = ["no-such-package>=1", 'pytest>=9999; extra == "test"', 'torch>=9999; sys_platform == "win32"']
    assert list(version_problems(wanted)) == []

    def missing(name):
        raise hardware.PackageNotFoundError

    monkeypatch.setattr(hardware, "requires", missing)
    assert requirements() == []


@pytest.mark.parametrize(
    ("answer", "ranks", "expected"),
    [  # memory.free, memory.used of each card, MiB; a card of 24,564 MiB, of which the driver keeps 340
        ("24224, 0", 1, 24224),
        ("20128, 4096", 1, 20128),  # another program has 4 GiB
        ("20128, 4096", 2, 24224),  # perhaps this run's first rank
        ("24224, 0\n12000, 100", 1, 12000),  # the fullest of the cards
        ("0, 24224", 1, 1),  # a full card is a card
        ("[N/A], [N/A]", 1, None),
        ("", 1, None),
    ],
)
def test_memory_of_a_card_is_what_a_process_can_get(answer, ranks, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase $1 in *memory.free,memory.used) printf '%b' '{answer}';; *) exit 2;; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert gpu_memory_gib() == (expected and expected / 1024)


def test_a_run_compares_its_plan_with_what_cuda_has_left(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 24 * GIB))
    assert World(0, 1, torch.device("cuda", 0)).free_gpu_gib() == 5.0
    assert World(0, 1, torch.device("cpu")).free_gpu_gib() is None
