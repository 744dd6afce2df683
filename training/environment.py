"""The environment of this process: commit, versions, machine and starting time."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Commit, versions and machine of this process, for config.json."""
    checkout = Path(__file__).resolve().parents[1]
    return {
        "git_commit": git(checkout, "rev-parse", "HEAD"),
        "git_dirty": bool(git(checkout, "status", "--porcelain")),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "triton", "numpy", "tiktoken")},
            "assembler": assembler(),
        },
        "platform": platform.platform(),
    }


def seconds_since_start() -> float:
    """Wall time since the process began; on systems other than Linux, since this import."""
    try:
        # Field 22 counts from boot in clock ticks; the name in field 2 may hold spaces.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED


_IMPORTED = time.perf_counter()


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None without git, without a checkout or without an answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_version(package: str) -> str | None:
    """Its version, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def assembler() -> str | None:
    """The ptxas that assembles kernels for this GPU, with its version; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(10 * major + minor)
        return f"{Path(tool.path).name} {tool.version}"
    except (ImportError, AttributeError, RuntimeError):  # no triton, another one, or no such file
        return None
