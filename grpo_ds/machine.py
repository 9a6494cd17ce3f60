"""What this machine has, found out without importing torch, which takes seconds."""

import os
import shutil
import subprocess
from pathlib import Path


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
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself. Others imitate it: one backward matmul was 80 times slower than fp32."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
