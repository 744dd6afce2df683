"""What is known of machines: datasheets of GPUs, and what this machine says of itself.

One table for everything that compares a speed with what the hardware could do: MFU, the roofline of
`train.py --explain`, the bench.
"""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import GPTConfig
from model.flops import flops_per_token
from training.torch_build import DRIVERS, WAY_OUT

# torch.compile on a CPU calls these; openssl hashes its precompiled headers.
COMPILE_TOOLS = ("g++", "as", "ld", "openssl")
NO_SPACE = "a torch in a folder without spaces"  # torch 2.13 does not quote it
FREE_SHARE = 0.9  # of a GPU's memory is free at least where nobody else uses it


@dataclass(frozen=True)
class Card:
    """Vendor's figures of a GPU, without sparsity."""

    tflops: float  # of dense products in `dtype`
    gbs: float  # GB/s of the memory
    dtype: str = "bf16"  # what training runs in there


# By the part of the device name that tells it; the first that fits counts. SXM forms where a name
# says no more, A100 with 80 GB.
CARDS: dict[str, Card] = {
    "B200": Card(2250.0, 8000.0),
    "H200": Card(989.5, 4800.0),
    "H100 PCIe": Card(756.0, 2000.0),
    "H100 NVL": Card(835.0, 3900.0),
    "H100": Card(989.5, 3350.0),
    "A100": Card(312.0, 2039.0),
    "L40S": Card(362.0, 864.0),
    "L4": Card(121.0, 300.0),
    "RTX 5090": Card(209.5, 1792.0),
    "RTX 4090": Card(165.2, 1008.0),
    "RTX 3090": Card(71.2, 936.0),
    "T4": Card(65.0, 300.0, dtype="fp16"),
}


def find_card(device_name: str) -> Card | None:
    """Figures of a device by its name, whole words only: a GH200 is no H200."""
    return next((c for key, c in CARDS.items() if re.search(rf"\b{key}\b", device_name)), None)


def mfu(config: GPTConfig, T: int, tokens_per_s: float, device_name: str) -> float | None:
    """Model flops utilisation in [0, 1] by the palm form; None for an unknown device."""
    card = find_card(device_name)
    return card and flops_per_token(config, T) * tokens_per_s / (card.tflops * 1e12)


@dataclass(frozen=True)
class Machine:
    """What the decisions depend on."""

    device: str  # "cpu" or "cuda"
    name: str  # as the vendor writes it
    arch: int = 0  # compute capability, 90 for an H100; 0 on a CPU
    num_threads: int = 1  # that torch uses on the CPU
    has_bf16: bool = False  # its products are faster than those of fp32
    missing_tools: tuple[str, ...] = ()  # what torch.compile needs and is not here
    interpreted: bool = False  # triton's kernels run on the CPU: TRITON_INTERPRET=1
    has_triton: bool = True  # it can be imported
    # Of the GPU, or what is free of it if others use it; on a CPU the machine's; 0 is unknown.
    memory_bytes: int = 0
    launcher_lacks: tuple[str, ...] = ()  # what triton needs to launch a kernel and is not here
    rocm: bool = False  # the GPU is AMD's
    notes: tuple[str, ...] = ()  # what someone might not expect of this machine, for the plan


def built_for(arch: int, targets: Sequence[str]) -> bool:
    """Whether a torch with these targets (torch.cuda.get_arch_list) runs on a compute capability.

    "sm_80" serves its generation from there on, "sm_90a" its own chip, "compute_90" all from there
    on; without any it is not known, and taken for granted.
    """
    for kind, number, exact in re.findall(r"(sm|compute)_(\d+)([a-z]?)", " ".join(targets)):
        least = int(number)
        same = kind == "compute" or least // 10 == arch // 10
        if arch == least or (least < arch and same and not exact):
            return True
    return not targets


def has_gpu() -> bool:
    """Whether torch sees a GPU and has kernels for it."""
    return torch.cuda.is_available() and (
        torch.version.hip is not None or built_for(_capability(), torch.cuda.get_arch_list())
    )


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def gpu_trouble() -> str:
    """Why a GPU that is here cannot be used, and the way out; "" if it can, or if there is none."""
    if has_gpu():
        return ""
    version = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        targets = ", ".join(torch.cuda.get_arch_list())
        return (
            f"{version} has no kernels for {torch.cuda.get_device_name()} (sm_{_capability()}), "
            f"only for {targets}: {WAY_OUT}"
        )
    if torch.backends.mps.is_available():
        return "this Mac's GPU is not used: nothing here has been run on one"
    card, driver = _nvidia_card()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return card and why_unusable(card, driver, version, torch.version.cuda, hidden)


def why_unusable(card: str, driver: str, version: str, cuda: str | None, hidden: str | None) -> str:
    """Why torch does not see a card of NVIDIA.

    Args:
        card, driver: As nvidia-smi names them; the driver may be "".
        version, cuda: Of torch, and what it was built for.
        hidden: CUDA_VISIBLE_DEVICES.
    """
    needed = DRIVERS.get(int((cuda or "0").partition(".")[0]), 0)
    major = driver.partition(".")[0]
    if cuda is None:
        why = f"{version} is a build for CPUs: {WAY_OUT}"
    elif major.isdecimal() and int(major) < needed:
        why = f"{version} is built for CUDA {cuda}, which needs driver {needed} or newer: "
        why += f"update the driver, or {WAY_OUT}"
    elif hidden is not None:
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"
    else:
        why = f"{version} cannot open it: python -c 'import torch; torch.cuda.init()' says why"
    return f"{card} is here (driver {driver or 'unknown'}), but {why}"


def _nvidia_card(proc: Path = Path("/proc/driver/nvidia")) -> tuple[str, str]:
    """Name and driver of the first card, from nvidia-smi or the kernel's module; "" for none."""
    found = nvidia_smi("name", "driver_version")
    if "name" in found:
        return found["name"], found.get("driver_version", "")
    try:
        driver = re.search(r"Module +(\d[\d.]+)", (proc / "version").read_text())
        cards = [path.read_text() for path in sorted((proc / "gpus").glob("*/information"))]
    except OSError:
        return "", ""
    names = [found[1] for text in cards if (found := re.search(r"Model:\s*(.+)", text))]
    return (names or [""])[0].strip(), driver[1] if driver else ""


def header_lacks() -> tuple[str, ...]:
    """Python.h, which triton and torch.compile build against, with its package; () if here."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return ()
    version = ".".join(platform.python_version_tuple()[:2])
    return (f"Python.h (package python{version}-dev or python3-devel)",)


def launcher_lacks() -> tuple[str, ...]:
    """What triton needs to launch a kernel and is not here; it looks in the same places."""
    lacks = [*header_lacks()]
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        lacks.append("a C compiler (package gcc)")
    with contextlib.suppress(ImportError):
        from triton.backends.nvidia import driver

        try:
            driver.libcuda_dirs()
        except Exception:  # an assertion, or no ldconfig
            lacks.append("libcuda.so.1 where ldconfig finds it (or TRITON_LIBCUDA_PATH)")
    return tuple(lacks)


def detect(device: str = "auto") -> Machine:
    """Describe this machine; `device` is auto, cpu or cuda.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    has_cuda = device != "cpu" and has_gpu()
    trouble = "" if has_cuda or device == "cpu" else gpu_trouble()
    if device == "cuda" and not has_cuda:
        why = trouble or "torch sees no GPU"
        raise ValueError(f"device: cuda asked for, but {why}; use --device cpu or auto")
    tools = tuple(t for t in COMPILE_TOOLS if shutil.which(t) is None)
    tools += (NO_SPACE,) * (" " in str(torch.__file__)) + header_lacks()
    common = Machine(
        device="cpu",
        name=cpu_name(),
        num_threads=torch.get_num_threads(),
        missing_tools=tools,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        has_triton=importlib.util.find_spec("triton") is not None,
        memory_bytes=ram_bytes(),
    )
    if not has_cuda:
        notes = (f"device cpu: {trouble}",) if trouble else ()
        return replace(common, has_bf16=cpu_has_bf16(), notes=notes)
    name, rocm = torch.cuda.get_device_name(), torch.version.hip is not None
    lacks = launcher_lacks() if common.has_triton and not (rocm or common.interpreted) else ()
    # torch.compile's kernels for a GPU are triton's.
    missing = (*(t for t in tools if t == "g++"), *lacks, *["triton"] * (not common.has_triton))
    free, total = torch.cuda.mem_get_info()
    notes = []
    if free < FREE_SHARE * total:
        notes.append(
            f"memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free on {name}; another "
            "process holds the rest"
        )
    if (count := torch.cuda.device_count()) > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        notes.append(
            f"one of {count} GPUs is used; all are by .venv/bin/torchrun --standalone "
            f"--nproc_per_node={count} train.py"
        )
    return replace(
        common,
        device="cuda",
        name=name,
        arch=_capability(),
        has_bf16=_capability() >= 80,
        memory_bytes=free if free < FREE_SHARE * total else total,
        missing_tools=missing,
        launcher_lacks=lacks,
        rocm=rocm,
        notes=tuple(notes),
    )


def cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; "" where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{key}[ \t]*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_name() -> str:
    """The CPU as its vendor writes it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """AMX-BF16, or AVX512-BF16 of AMD.

    AVX512-BF16 alone does not decide: an Intel Xeon without AMX multiplies 1024 x 1024 matrices at
    198 GFLOP/s in bf16 and 371 in fp32, and steps of shakespeare-cpu take 1.3 to 1.5 times as long
    (bench/LOG.md); on AMD's EPYC bf16 gains from 256 wide on.
    """
    flags = cpuinfo("flags").split()
    amd = "avx512_bf16" in flags and cpuinfo("vendor_id") == "AuthenticAMD"
    return "amx_bf16" in flags or amd


def num_cores() -> int:
    """CPU cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def ram_bytes() -> int:
    """Memory of this machine in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can still be taken here without swapping; 0 where the system does not tell.

    What the machine has available, or what the limit of this process's cgroup (version 2) or of one
    above it leaves, whichever is smaller. Cached files count as free in both.
    """

    def read(path: Path, pattern: str) -> int:
        return int(re.findall(pattern, path.read_text(), re.MULTILINE)[0])

    free: list[int] = []
    with contextlib.suppress(OSError, IndexError):
        free.append(read(proc / "meminfo", r"^MemAvailable: +(\d+) kB$") << 10)
        name = (proc / "self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
        here = cgroups / name.strip("/")
        for folder in (here, *here.parents):
            # No such file, or the limit is "max".
            with contextlib.suppress(OSError, IndexError):
                left = read(folder / "memory.max", r"^\d+$") - read(
                    folder / "memory.current", r"\d+"
                )
                free.append(left + read(folder / "memory.stat", r"^inactive_file (\d+)$"))
    return max(0, min(free, default=0))


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU now, by field; without what it does not know.

    Args:
        fields: As `nvidia-smi --help-query-gpu` names them.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = None  # its order is not CUDA's, and CUDA_VISIBLE_DEVICES is nothing to it
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for which in ([f"--id=GPU-{uuid}"], []) if uuid else ([],):  # part of a card has another name
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [*query, *which], capture_output=True, text=True, timeout=20, check=True
            )
            values = map(str.strip, done.stdout.partition("\n")[0].split(","))
            known = {"name": r"\w.*"}  # all others are numbers; "[N/A]" and its like are no values
            found = zip(fields, values, strict=False)
            return {
                key: text for key, text in found if re.fullmatch(known.get(key, r"[\d.]+"), text)
            }
    return {}
