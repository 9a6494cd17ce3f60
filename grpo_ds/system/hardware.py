"""What this machine has, found out without importing torch, which takes seconds."""

import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo_ds.errors import UsageError

OLDEST_TORCH = (2, 10)  # until then a crafted file could run code under weights_only as well (CVE-2026-24747)


def check_torch() -> None:
    """Raises UsageError for a torch that cannot be trusted to read weights; without any, its import will say so."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST_TORCH:
        raise UsageError(
            f"torch {installed} is installed, and up to 2.9 a file of weights can be made to run code on reading.\n"
            'Install 2.10 or newer: pip install "torch>=2.10", or `make install` for the versions tested here.'
        )


def gpu_memory_gib() -> float | None:
    """Memory of the smallest visible NVIDIA card, or None. By nvidia-smi: importing torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible in ("", "-1"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    query += [f"--id={visible}"] if visible else []
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    sizes = [float(line) / 1024 for line in answer.stdout.split() if line.replace(".", "").isdigit()]
    return min(sizes, default=None)


def ram_gib() -> float:
    """Memory this process may use: the machine's, or less where a container's limit says so."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, cgroup_limit() or physical) / 2**30


def cgroup_limit(membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes the tightest cgroup around this process allows (v1 or v2), None without a limit.

    A container may see its own group as the root of the mount while `membership` still names the host's path:
    every folder from the named one up to the mount is looked at, and those that are not there say nothing.
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
                limits.append(int(text))  # v2 says "max" for none, v1 a number beyond any machine
    return min(limits, default=None)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself. Others imitate it: one backward matmul was 80 times slower than fp32."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
