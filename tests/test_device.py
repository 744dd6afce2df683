"""Whether this machine is what it seems: a GPU that cannot be used, shared, or not NVIDIA's."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from kernels._op import INTERPRETED
from tests.pretend_cuda import DEVICE, pretend_cuda
from training import machines
from training.machines import Machine, built_for, launcher_lacks, why_unusable
from training.plan import Choices, make_plan
from training.recipes import PRESETS

SEED = PRESETS["shakespeare-124m"]
H100 = Machine("cuda", "NVIDIA H100", 90, has_bf16=True, memory_bytes=80 << 30)
MI300X = Machine(
    "cuda", "AMD Instinct MI300X", 94, has_bf16=True, memory_bytes=192 << 30, rocm=True
)
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]
detect = inspect.unwrap(machines.detect)  # where `--machine` replaces it
pretended = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")


@pytest.mark.parametrize(
    ("arch", "targets", "runs"),
    [
        (70, CUDA_13, False),  # V100
        (61, CUDA_13, False),  # Pascal
        (75, CUDA_13, True),
        (89, CUDA_13, True),  # by sm_86
        (87, CUDA_13, True),
        (90, CUDA_13, True),
        (103, CUDA_13, True),  # by sm_100
        (121, CUDA_13, True),
        (130, CUDA_13, True),  # by compute_120, compiled on the spot
        (91, ["sm_90a"], False),
        (90, ["sm_100", "compute_100"], False),
        (70, ["sm_50", "sm_60", "sm_70"], True),
        (70, [], True),  # not known
    ],
)
def test_what_a_torch_is_built_for(arch: int, targets: list[str], runs: bool) -> None:
    assert built_for(arch, targets) == runs


@pytest.mark.parametrize(
    ("driver", "version", "cuda", "hidden", "said"),
    [
        ("535.104.05", "torch 2.13.0+cu130", "13.0", None,
         "built for CUDA 13.0, which needs driver 580 or newer: update the driver, or `make -B"),
        ("515.1", "torch 2.5.0", "12.4", "0", "which needs driver 525 or newer"),
        ("580.65.06", "torch 2.13.0", "13.0", "", "CUDA_VISIBLE_DEVICES='' hides it"),
        ("580.65.06", "torch 2.13.0", "13.0", "7", "CUDA_VISIBLE_DEVICES='7' hides it"),
        ("580.65.06", "torch 2.13.0", "13.0", None, "cannot open it: python -c"),
        ("", "torch 2.13.0", "13.0", None, "(driver unknown), but torch 2.13.0 cannot open it"),
        ("odd", "torch 2.13.0", "14.0", None, "cannot open it"),
        ("580.65.06", "torch 2.13.0+cpu", None, None,
         "is a build for CPUs: `make -B setup` installs the build that fits, or says why"),
    ],
)  # fmt: skip
def test_why_torch_does_not_see_a_card(
    driver: str, version: str, cuda: str | None, hidden: str | None, said: str
) -> None:
    line = why_unusable("NVIDIA A100", driver, version, cuda, hidden)
    assert line.startswith("NVIDIA A100 is here (driver ")
    assert said in line
    assert "\n" not in line


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    """nvidia-smi answers and torch sees nothing: what is said of that."""
    if torch.cuda.is_available():
        pytest.skip("torch sees the GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = SimpleNamespace(stdout="NVIDIA A100-SXM4-80GB, 535.104.05\n")
    monkeypatch.setattr(machines.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return "NVIDIA A100-SXM4-80GB is here (driver 535.104.05), but torch "


def test_a_gpu_that_torch_cannot_use_is_named(
    old_driver: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    machine = detect("auto")
    assert machine.device == "cpu"
    assert make_plan(SEED, machine).notes[0].startswith(f"device cpu: {old_driver}")
    assert not any(old_driver in note for note in make_plan(SEED, detect("cpu")).notes)
    flags = ["--preset", "smoke", "--device", "cuda", "--out", str(tmp_path / "run")]
    for more in ([], ["--explain"]):
        assert train.main([*flags, *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"train.py: device: cuda asked for, but {old_driver}")
        assert line.endswith("; use --device cpu or auto\n")
    assert not (tmp_path / "run").exists()


def test_a_card_without_nvidia_smi_is_found_in_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machines, "nvidia_smi", lambda *_: {})
    assert machines._nvidia_card(tmp_path) == ("", "")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05\n"
    )
    assert machines._nvidia_card(tmp_path) == ("", "535.104.05")
    information = tmp_path / "gpus" / "0000:01:00.0" / "information"
    information.write_text("Model: \t\t NVIDIA L4\nIRQ:   \t\t 123\n")
    assert machines._nvidia_card(tmp_path) == ("NVIDIA L4", "535.104.05")


def test_nothing_is_said_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(machines, "_nvidia_card", lambda: ("", ""))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machines.gpu_trouble() == ""
    assert detect("auto").notes == ()
    with pytest.raises(ValueError, match="cuda asked for, but torch sees no GPU; use --device cpu"):
        detect("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert detect("auto").notes == ("device cpu: " + machines.gpu_trouble(),)
    assert "this Mac's GPU is not used" in machines.gpu_trouble()


@pretended
def test_a_card_that_torch_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        assert machines.has_gpu()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
        assert not machines.has_gpu()
        machine = detect("auto")
        assert machine.device == "cpu"
        assert (
            f"has no kernels for {DEVICE.name} (sm_70), only for sm_75, sm_80" in machine.notes[0]
        )
        with pytest.raises(ValueError, match=r"no kernels for .* \(sm_70\)"):
            detect("cuda")


@pretended
def test_a_card_too_old_for_triton_is_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_60", "sm_90"])
        made = make_plan(SEED, detect())
    assert (made.device, made.ops, made.dtype, made.compile) == ("cuda", "eager", "fp32", False)
    assert "not compiled: torch.compile needs sm_70 or newer, got sm_60" in made.notes


@pretended
def test_a_card_that_others_use_has_what_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        assert (detect().memory_bytes, detect().notes) == (DEVICE.total_memory, ())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (20 << 30, DEVICE.total_memory))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        machine = detect()
        assert machine.memory_bytes == 20 << 30
        shared, idle = make_plan(SEED, machine).notes[:2]
        assert shared.startswith(f"memory: 20.0 of 80.0 GiB are free on {DEVICE.name}; another")
        assert idle.endswith("torchrun --standalone --nproc_per_node=4 train.py")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert len(detect().notes) == 1


@pretended
def test_a_card_without_room_for_a_process_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")

    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "mem_get_info", full)
        assert train.main(["--preset", "smoke"]) == 2
        assert detect("cpu").device == "cpu"
    assert capsys.readouterr().err == (
        f"train.py: device: {DEVICE.name} takes no process now (CUDA error: out of memory); "
        "choose another with CUDA_VISIBLE_DEVICES, or --device cpu\n"
    )


@pretended
def test_nvidia_smi_is_asked_of_the_card_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        if len(asked) == 2:  # a slice of a card is not known by its own name
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="580.1\n")

    monkeypatch.setattr(machines.subprocess, "run", run)
    with pretend_cuda():
        card = SimpleNamespace(**vars(DEVICE), uuid="ab-12")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
        for _ in range(2):
            assert machines.nvidia_smi("driver_version") == {"driver_version": "580.1"}
    assert ["--id=GPU-ab-12" in command for command in asked] == [True, True, False]


def test_on_amd_the_kernels_are_not_chosen_and_may_be_tried() -> None:
    made = make_plan(SEED, MI300X)
    assert (made.ops, made.optimizer, made.dtype, made.compile) == ("eager", "torch", "bf16", True)
    assert (
        "ops eager: our kernels have never run on AMD GPUs; --ops triton tries them" in made.notes
    )
    asked = make_plan(SEED, MI300X, Choices(ops="triton", optimizer="triton"))
    assert (asked.ops, asked.optimizer) == ("triton", "triton")


def test_a_launcher_that_cannot_be_built_is_no_launcher() -> None:
    header = "Python.h (package python3.11-dev or python3-devel)"
    bare = replace(H100, launcher_lacks=(header,), missing_tools=(header,))
    made = make_plan(SEED, bare)
    assert (made.ops, made.optimizer, made.compile) == ("eager", "torch", False)
    assert f"ops eager: triton needs {header}" in made.notes
    assert f"not compiled: torch.compile needs {header}" in made.notes
    with pytest.raises(ValueError, match=r"^ops: 'triton' needs Python\.h"):
        make_plan(SEED, bare, Choices(ops="triton"))
    with pytest.raises(ValueError, match=r"^optimizer: triton needs Python\.h"):
        make_plan(SEED, bare, Choices(optimizer="triton"))


def test_what_a_launcher_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    driver = SimpleNamespace(libcuda_dirs=list)
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia", SimpleNamespace(driver=driver))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machines.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    monkeypatch.setattr(machines.shutil, "which", lambda name: name if name == "clang" else None)
    assert launcher_lacks() == ()
    monkeypatch.setenv("CC", "no-such-compiler")
    (tmp_path / "Python.h").unlink()
    driver.libcuda_dirs = lambda: 1 / 0
    header, compiler, library = launcher_lacks()
    assert header.startswith("Python.h (package python3.")
    assert compiler == "a C compiler (package gcc)"
    assert library.startswith("libcuda.so.1 where ldconfig finds it")
