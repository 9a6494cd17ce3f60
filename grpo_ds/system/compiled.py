"""Our C++ files, built with the machine's compiler at first use and cached where torch caches its extensions.

A library is a plain shared object, loaded with ctypes. With torch's headers a build would take a minute instead of nine
seconds, and torch's loader needs ninja and waits for ever for the lock of a killed build. The file name has a hash of
source and flags, and the file is renamed when complete, so ranks can build at the same time.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILD_SECONDS = 300  # limit; a build takes about ten on two cores


def build(name: str, source: Path, flags: Sequence[str]) -> Path:
    """Return the library compiled from `source`; raises OSError or SubprocessError if it cannot be built."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) on PATH; install g++ for a faster step")
    digest = hashlib.sha256(source.read_bytes() + " ".join((compiler, *flags)).encode()).hexdigest()[:16]
    built = _cache_folder(name) / f"{name}-{digest}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            output = Path(scratch) / built.name
            command = [*compiler.split(), *flags, str(source), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
            output.replace(built)
    return built


def _cache_folder(name: str) -> Path:
    """Return the folder that torch.utils.cpp_extension.load would use for an extension of this name."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / name
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_cpu" / name


def reason(error: Exception) -> str:
    """Say in a line why `build`, or loading what it built, failed."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [""]
        return f"{error.cmd[0]} failed: {lines[0]}"
    return str(error)
