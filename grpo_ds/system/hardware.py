"""Hardware and software of this machine: versions, GPU memory, RAM, precision. Does not import torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from grpo_ds.errors import PreflightError, UsageError, one_error

# fp16: 16 bits on a card without bf16, with a loss scale. fp32: a CPU that only emulates bf16.
Precision = Literal["bf16", "fp16", "fp32"]
# Compute capabilities: V100; T4 and RTX 20xx; A100 and RTX 30xx.
OLDEST_CARD, INT8_CARD, BF16_CARD = (7, 0), (7, 5), (8, 0)
OLDEST_TORCH = (2, 10)  # before it a crafted file could run code even under weights_only (CVE-2026-24747)
# Packages whose older versions do not fail but train wrongly.
WHY_NEWER = {
    "deepspeed": "before 0.19.0 it silently lost the gradients of all but one backward of a step",
    "bitsandbytes": "before 0.50 its 8-bit AdamW does not step on a CPU",
    "transformers": "before 5.0 our attention for packed rows cannot be registered",
}


# --- versions ------------------------------------------------------------------------------------------------


def check_torch() -> None:
    """Raise UsageError for a torch that reads weights unsafely; a missing torch is reported by its import."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST_TORCH:
        raise UsageError(
            f"torch {installed} is installed, and up to 2.9 a file of weights can be made to run code on reading.\n"
            'Install 2.10 or newer: pip install "torch>=2.10", or `make install` for the versions tested here.'
        )


def check_versions() -> None:
    """Raise PreflightError, one for all packages that are too old or too new."""
    if problems := list(version_problems(requirements())):
        remedy = "Install versions that are known to work: make install, or pip install -U -c constraints.txt -e ."
        raise one_error(PreflightError, "Installed versions that this trainer cannot rely on:", problems, remedy)


def requirements() -> list[str]:
    """Requirements of setup.cfg, as recorded at installation; [] for a copy that was not installed."""
    try:
        return requires("grpo_ds") or []
    except PackageNotFoundError:
        return []


def version_problems(wanted: Iterable[str]) -> Iterator[str]:
    """Return a line for each package whose version does not fit `wanted`, such as "deepspeed>=0.19.6"."""
    from packaging.requirements import Requirement  # 30 ms that --help should not wait for

    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:  # reported by its import, if it is needed
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            why = f": {WHY_NEWER[requirement.name]}" if requirement.name in WHY_NEWER else ""
            yield f"{requirement.name} {found}, but {requirement.specifier} is needed{why}"


# --- memory --------------------------------------------------------------------------------------------------


def gpu_memory_gib() -> float | None:
    """GPU memory in GiB that a process could get now on the fullest visible NVIDIA card; None without a card.

    Estimated from nvidia-smi, because torch takes seconds: `memory.free` is the total less what the driver keeps for
    itself (0.3 to 0.6 GiB that CUDA never gives) and what other programs use. Of several ranks one may be ahead, and
    what it holds is not another program's: then the total less what the driver keeps.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    answers = _of_each_card("memory.free,memory.used")
    cards = [[float(number) for number in line.split(",") if _is_number(number)] for line in answers]
    sizes = [max(1.0, free + (0 if alone else sum(used))) / 1024 for free, *used in filter(None, cards)]
    return min(sizes, default=None)


def gpu_name() -> str | None:
    """Name of the first visible card, as nvidia-smi has it; None without a card."""
    return next(iter(_of_each_card("name")), None)


def _of_each_card(fields: str) -> list[str]:
    """nvidia-smi's answers for these fields, a line for each visible card; [] without a card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible in ("", "-1"):
        return []
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    query += [f"--id={visible}"] if visible else []
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "").isdigit()


def ram_gib() -> float:
    """RAM that this process may use, in GiB: the machine's, or a container's limit if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, cgroup_limit() or physical) / 2**30


def cgroup_limit(membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the tightest cgroup around this process allows (v1 or v2), None without a limit.

    A container may see its own group as the root of the mount while `membership` still has the path outside it, so
    every folder from that path up to the mount is read; missing ones are skipped.
    """
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        top, name = (mount / "memory", "memory.limit_in_bytes") if v1 else (mount, "memory.max")
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:
            limit = group / name
            if group.is_relative_to(top) and limit.is_file() and (text := limit.read_text().strip()).isdigit():
                limits.append(int(text))  # no limit: v2 has "max", v1 a number larger than any machine
    return min(limits, default=None)


# --- precision -----------------------------------------------------------------------------------------------


def compute_capability() -> tuple[int, int] | None:
    """Lowest compute capability of the visible cards, such as (7, 5); None if there is no card or it is not told."""
    answers = [re.fullmatch(r"(\d+)\.(\d+)", line) for line in _of_each_card("compute_cap")]
    return min(((int(found[1]), int(found[2])) for found in answers if found), default=None)


def native_precision(*, on_gpu: bool) -> Precision:
    """Precision that this machine computes in without emulating it. Raises UsageError for a card that is too old."""
    if not on_gpu:
        return "bf16" if cpu_has_bf16() else "fp32"
    capability = compute_capability() or BF16_CARD
    if capability < OLDEST_CARD:
        raise UsageError(
            f"This card has compute capability {capability[0]}.{capability[1]}; the oldest that can train here is "
            "7.0 (V100, T4, RTX 20xx).\nOlder cards have no tensor cores, and their fp16 is mostly slower than fp32. "
            "Use a newer card, or\ntrain on the CPU: set CUDA_VISIBLE_DEVICES to nothing, with --model smollm2-135m."
        )
    return "bf16" if capability >= BF16_CARD else "fp16"


def cpu_has_bf16() -> bool:
    """True if the CPU multiplies bf16 itself. Others emulate it: a backward matmul was 80 times slower than fp32."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
