"""What is known about machines: data sheets of GPUs, and what this machine reports."""

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
MIN_COMPILE_ARCH = 70  # the oldest GPU that torch.compile takes
NO_SPACE = "a torch in a folder without spaces"  # torch 2.13 does not quote its path
FREE_SHARE = 0.9  # if less of a GPU's memory is free, another process uses it


@dataclass(frozen=True)
class Card:
    """The vendor's figures for a GPU, without sparsity."""

    tflops: float  # dense products in `dtype`
    gbs: float  # GB/s of the memory
    dtype: str = "bf16"  # the dtype it trains in
    arch: int = 0  # compute capability; 0: the fields below are unknown
    gib: int = 0  # memory size
    sms: int = 0
    ghz: float = 0.0  # boost clock


# By part of the device name; the first match counts. A bare name means the SXM form, and A100 the
# one with 80 GB.
CARDS: dict[str, Card] = {
    "B200": Card(2250.0, 8000.0, arch=100, gib=180, sms=148, ghz=1.85),
    "H200": Card(989.5, 4800.0, arch=90, gib=141, sms=132, ghz=1.83),
    "H100 PCIe": Card(756.0, 2000.0),
    "H100 NVL": Card(835.0, 3900.0),
    "H100": Card(989.5, 3350.0, arch=90, gib=80, sms=132, ghz=1.83),
    "A100": Card(312.0, 2039.0, arch=80, gib=80, sms=108, ghz=1.41),
    "L40S": Card(362.0, 864.0, arch=89, gib=48, sms=142, ghz=2.52),
    "L4": Card(121.0, 300.0, arch=89, gib=24, sms=58, ghz=2.04),
    "RTX 5090": Card(209.5, 1792.0, arch=120, gib=32, sms=170, ghz=2.41),
    "RTX 4090": Card(165.2, 1008.0, arch=89, gib=24, sms=128, ghz=2.52),
    "RTX 3090": Card(71.2, 936.0, arch=86, gib=24, sms=82, ghz=1.70),
    "T4": Card(65.0, 300.0, dtype="fp16"),
}


def find_card(device_name: str) -> Card | None:
    """Figures for a device by its name. Only whole words match: a GH200 is not an H200."""
    return next((c for key, c in CARDS.items() if re.search(rf"\b{key}\b", device_name)), None)


def mfu(config: GPTConfig, T: int, tokens_per_s: float, device_name: str) -> float | None:
    """Model flops utilisation in [0, 1], with PaLM's count of flops; None for an unknown device."""
    card = find_card(device_name)
    return card and flops_per_token(config, T) * tokens_per_s / (card.tflops * 1e12)


@dataclass(frozen=True)
class Machine:
    """What a plan depends on."""

    device: str  # "cpu" or "cuda"
    name: str  # as the vendor writes it
    arch: int = 0  # compute capability, 90 for an H100; 0 on a CPU
    num_threads: int = 1  # of torch on the CPU
    has_bf16: bool = False  # products are faster in bf16 than in fp32
    missing_tools: tuple[str, ...] = ()  # what torch.compile needs but does not find
    interpreted: bool = False  # triton's kernels run on the CPU: TRITON_INTERPRET=1
    has_triton: bool = True  # it can be imported
    memory_bytes: int = 0  # of the GPU (the free part, if others use it) or RAM; 0: unknown
    launcher_lacks: tuple[str, ...] = ()  # what triton needs to launch a kernel but does not find
    rocm: bool = False  # the GPU is AMD's
    notes: tuple[str, ...] = ()  # lines for the plan about what a user might not expect


def built_for(arch: int, targets: Sequence[str]) -> bool:
    """Whether a torch built for these targets (torch.cuda.get_arch_list) runs on a capability.

    "sm_80" runs on 80 and newer chips of that generation, "sm_90a" on 90 alone, "compute_90" on 90
    and everything newer. Without targets the answer is yes.
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
    """Why a present GPU cannot be used, and the way out; "" if it can, or if there is none."""
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
        return "this Mac's GPU is not used: nothing here has run on one"
    card, driver = _nvidia_card()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return card and why_unusable(card, driver, version, torch.version.cuda, hidden)


def why_unusable(card: str, driver: str, version: str, cuda: str | None, hidden: str | None) -> str:
    """Why torch does not see an NVIDIA card.

    Args:
        card, driver: As nvidia-smi names them; the driver may be "".
        version, cuda: Torch's version, and the CUDA it was built for.
        hidden: CUDA_VISIBLE_DEVICES.
    """
    needed = DRIVERS.get(int((cuda or "0").partition(".")[0]), 0)
    major = driver.partition(".")[0]
    if cuda is None:
        why = f"{version} is a build for CPUs: {WAY_OUT}"
    elif major.isdecimal() and int(major) < needed:
        why = (
            f"{version} is built for CUDA {cuda}, which needs driver {needed} or newer: update the "
            f"driver, or {WAY_OUT}"
        )
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
        cards = "\n".join(path.read_text() for path in sorted(proc.glob("gpus/*/information")))
    except OSError:
        return "", ""
    name = re.search(r"^Model:\s*(.+)$", cards, re.MULTILINE)
    return name[1].strip() if name else "", driver[1] if driver else ""


def header_lacks() -> tuple[str, ...]:
    """Python.h and its package, if it is missing: triton and torch.compile need it."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return ()
    version = ".".join(platform.python_version_tuple()[:2])
    return (f"Python.h (package python{version}-dev or python3-devel)",)


def launcher_lacks() -> tuple[str, ...]:
    """What triton needs to launch a kernel but would not find."""
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
        ValueError: cuda is asked for and there is none, or no process fits on it now.
    """
    has_cuda = device != "cpu" and has_gpu()
    trouble = "" if has_cuda or device == "cpu" else gpu_trouble()
    if device == "cuda" and not has_cuda:
        why = trouble or "torch sees no GPU"
        raise ValueError(f"device: cuda asked for, but {why}; use --device cpu or auto")
    tools = [tool for tool in COMPILE_TOOLS if shutil.which(tool) is None]
    has_triton = importlib.util.find_spec("triton") is not None
    common = Machine(
        device="cpu",
        name=cpu_name(),
        num_threads=torch.get_num_threads(),
        has_bf16=cpu_has_bf16(),
        missing_tools=(*tools, *[NO_SPACE] * (" " in str(torch.__file__)), *header_lacks()),
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        has_triton=has_triton,
        memory_bytes=ram_bytes(),
        notes=(f"device cpu: {trouble}",) if trouble else (),
    )
    if not has_cuda:
        return common
    name, rocm = torch.cuda.get_device_name(), torch.version.hip is not None
    lacks = launcher_lacks() if has_triton and not (rocm or common.interpreted) else ()
    # torch.compile's kernels for a GPU are triton's.
    missing = [*["g++"] * ("g++" in tools), *lacks, *["triton"] * (not has_triton)]
    if _capability() < MIN_COMPILE_ARCH:
        missing.append(f"sm_{MIN_COMPILE_ARCH} or newer, got sm_{_capability()}")
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:  # no memory for a CUDA context, or a card for one process alone
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"device: {name} takes no process now ({why}); choose another with "
            "CUDA_VISIBLE_DEVICES, or --device cpu"
        ) from None
    notes = []
    if free < FREE_SHARE * total:
        notes.append(
            f"memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free on {name}; another "
            "process uses the rest"
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
        missing_tools=tuple(missing),
        launcher_lacks=lacks,
        rocm=rocm,
        notes=tuple(notes),
    )


def cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, or ""."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{key}[ \t]*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_name() -> str:
    """The CPU as its vendor writes it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether products are faster in bf16: with AMX-BF16, or with AVX512-BF16 from AMD.

    With AVX512-BF16 but no AMX, an Intel Xeon multiplies 1024 x 1024 matrices at 198 GFLOP/s in
    bf16 and 371 in fp32, and steps of shakespeare-cpu take 1.3 to 1.5 times as long (bench/LOG.md).
    On AMD's EPYC, bf16 gains from a width of 256 on.
    """
    flags = cpuinfo("flags").split()
    amd = "avx512_bf16" in flags and cpuinfo("vendor_id") == "AuthenticAMD"
    return "amx_bf16" in flags or amd


def num_cores() -> int:
    """CPU cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def ram_bytes() -> int:
    """RAM of this machine; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can still be used here without swapping; 0 if unknown.

    This is what the machine has available, or less where this process's cgroup (version 2) or a
    parent of it has a limit. Cached files count as free in both.
    """

    def read(path: Path, pattern: str) -> int:
        return int(re.findall(pattern, path.read_text(), re.MULTILINE)[0])

    free: list[int] = []
    with contextlib.suppress(OSError, IndexError):
        free.append(read(proc / "meminfo", r"^MemAvailable: +(\d+) kB$") << 10)
        name = (proc / "self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
        here = cgroups / name.strip("/")
        for folder in (here, *here.parents):
            with contextlib.suppress(OSError, IndexError):  # no such file, or no limit: "max"
                limit, used = read(folder / "memory.max", r"^\d+$"), folder / "memory.current"
                cached = read(folder / "memory.stat", r"^inactive_file (\d+)$")
                free.append(limit - read(used, r"\d+") + cached)
    return max(0, min(free, default=0))


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi reports about the GPU in use, by field; fields unknown to it are left out.

    Args:
        fields: As `nvidia-smi --help-query-gpu` names them.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = None  # nvidia-smi ignores CUDA's order and CUDA_VISIBLE_DEVICES
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for which in ([f"--id=GPU-{uuid}"], []) if uuid else ([],):  # MIG slices have another uuid
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [*query, *which], capture_output=True, text=True, timeout=20, check=True
            )
            values = map(str.strip, done.stdout.partition("\n")[0].split(","))
            # Every field but the name is a number; "[N/A]" and the like are no values.
            known = zip(fields, values, strict=False)
            return {
                k: v for k, v in known if re.fullmatch(r"\w.*" if k == "name" else r"[\d.]+", v)
            }
    return {}
