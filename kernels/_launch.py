"""Which launch a kernel takes: `launch_for(key)` over the rows of launches.toml. No tensors here.

Tuning is committed data. An op asks for its launch when it runs and gets the most specific row for
its key: a measured row before one that was only compiled. What `make tune` measured on this machine
overrides the file's rows before the first step (`lay_over`). After that only a trial (`replaced`)
changes an answer, so a captured step and a second run launch the same as the first one.
"""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROWS = Path(__file__).with_name("launches.toml")
LAYERS = ("measured", "compiled", "candidates")  # its sections; no call uses the last
ANY = "any"
# Chips that share instructions and sizes share rows, under the name of the first.
FAMILY = {103: 100, 121: 120}


def family(arch: int) -> int:
    """The chip whose rows serve `arch`."""
    return FAMILY.get(arch, arch)


@cache
def triton_version() -> str:
    """Such as "3.7"; what triton compiles from a row changes with it."""
    import triton  # `eager` does not need it

    return ".".join(triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Key:
    """Everything that a launch may depend on. In a row's key, ANY matches every value."""

    kernel: str  # "<op>.<kernel>", e.g. "gelu_mlp.up"
    math: str  # "16-bit" operands, or how fp32 ones are multiplied, "tf32" or "ieee"
    # Words, the most important first, e.g. "D=64 T>=2048". A row with fewer words serves every size
    # that begins with them.
    size: str
    arch: int | str  # compute capability, e.g. 90; a row names its family. 0 is the interpreter
    triton: str = field(default_factory=triton_version)

    def serves(self, key: "Key") -> bool:
        """Whether the row with this key is one for `key`."""
        words = [] if self.size == ANY else self.size.split()
        return (
            self.kernel in (key.kernel, key.kernel.partition(".")[0] + "." + ANY)
            and self.math in (key.math, ANY)
            and key.size.split()[: len(words)] == words
            and (self.arch == ANY or self.arch == family(int(key.arch)))
            and self.triton in (key.triton, ANY)
        )

    def rank(self) -> tuple[int, ...]:
        """Larger for the more specific of two rows that serve one key."""
        words = 0 if self.size == ANY else len(self.size.split())
        said = [value != ANY for value in (self.triton, self.arch, self.math)]
        return *said, words, not self.kernel.endswith(ANY)

    def __str__(self) -> str:
        return f"{self.kernel}, {self.math}, {self.size}, sm_{self.arch}, triton {self.triton}"


@dataclass(frozen=True)
class Launch:
    """One launch configuration; warps, stages and maxnreg are triton's."""

    blocks: tuple[tuple[str, int], ...]  # sizes by kernel parameter, e.g. ("BLOCK_M", 128)
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None  # limit per thread, if that makes room for another program per SM
    programs_per_sm: int = 1  # how many run side by side; a persistent grid has as many
    # The result file and date that chose the row, or what compiling it has shown.
    source: str = field(default="", compare=False)

    def kwargs(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        warps = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # The default up to 3.9, which warns that 3.10 turns it off.
        return {**dict(self.blocks), **warps, **limit, "enable_fp_fusion": True}


def _read_row(op: str, row: Any, sources: Mapping[str, str]) -> tuple[Key, Launch]:
    """One row of the file; ValueError says what is wrong with it."""
    if not isinstance(row, list) or len(row) != 11:
        raise ValueError("a row has 11 columns, as the head of the file names them")
    kernel, math, size, arch, triton, blocks, warps, stages, maxnreg, programs, source = row

    def check(name: str, value: Any, holds: Any, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must {what}, got {value!r}")

    for name, value in {"kernel": kernel, "math": math, "size": size, "triton": triton}.items():
        check(name, value, isinstance(value, str) and value != "", f"be a word or {ANY!r}")
    first = type(arch) is int and family(arch) == arch
    check("arch", arch, arch == ANY or first, "be a number such as 90, its family's first")
    check("blocks", blocks, isinstance(blocks, dict), "be such as {BLOCK_M = 64}")
    for name, value in {**blocks, "warps": warps}.items():
        power = type(value) is int and value > 0 and value.bit_count() == 1
        check(name, value, power, "be a power of two")
    numbers = {"stages": (stages, 1), "registers": (maxnreg, 0), "programs": (programs, 1)}
    for name, (value, least) in numbers.items():
        enough = type(value) is int and value >= least
        check(name, value, enough, f"be a number of at least {least}")
    check("source", source, source and isinstance(source, str), "say where the row comes from")
    return Key(f"{op}.{kernel}", math, size, arch, triton), Launch(
        tuple(blocks.items()), warps, stages, maxnreg or None, programs, sources.get(source, source)
    )


def read_rows(text: str) -> tuple[dict[Key, Launch], ...]:
    """The rows of a file like launches.toml, by layer.

    Raises:
        ValueError: an invalid row; the message names it.
    """
    data = tomllib.loads(text)
    sources = data.pop("sources", {})
    if unknown := [*data.keys() - LAYERS]:
        raise ValueError(f"launch rows: unknown table {unknown[0]!r}; there are {LAYERS}")
    layers: list[dict[Key, Launch]] = []
    for layer in LAYERS:
        rows: dict[Key, Launch] = {}
        for op, lines in data.get(layer, {}).items():
            for line in lines:
                try:
                    key, launch = _read_row(op, line, sources)
                    if layer == "measured" and ANY in astuple(key):
                        raise ValueError(f"a measured row was measured at one key, not at {ANY!r}")
                    if key in rows:
                        raise ValueError("there is another row with this key")
                except ValueError as error:
                    raise ValueError(f"launch rows: {layer}, {op}, {line}: {error}") from None
                rows[key] = launch
        layers.append(rows)
    return tuple(layers)


@cache
def rows() -> tuple[dict[Key, Launch], ...]:
    """What launches.toml holds; read once."""
    return read_rows(ROWS.read_text(encoding="utf-8"))


_laid_over: dict[Key, Launch] = {}


def lay_over(text: str) -> None:
    """Let rows measured on this machine override those of the file from now on.

    Args:
        text: The table [measured] of a file like launches.toml; "" removes them again.

    Raises:
        ValueError: as `read_rows`.
    """
    found, *_ = read_rows(text)
    _laid_over.clear()
    _laid_over.update(found)
    _row_for.cache_clear()


@cache
def _row_for(key: Key) -> Launch | None:
    for layer in (_laid_over, *rows()[:-1]):
        if serving := [row for row in layer if row.serves(key)]:
            return layer[max(serving, key=Key.rank)]
    return None


def candidates_for(key: Key) -> list[Launch]:
    """Rows that no call uses until a GPU has timed them; `make tune` tries them first."""
    return [launch for row, launch in rows()[-1].items() if row.serves(key)]


# A kernel, what it is launched with instead, and the answers given: see `replaced`.
_trial: tuple[str, Launch | None, list[tuple[Key, Launch]]] | None = None


def launch_for(key: Key, safe: Launch | None = None) -> Launch:
    """The launch of one call. Ask inside an op: traced code would keep the answer.

    Args:
        safe: what to take where no row serves the key.

    Raises:
        LookupError: no row, and no `safe`.
    """
    found = _row_for(key) or safe
    if found is None:
        raise LookupError(f"launch rows: none for {key}; each kernel needs one of any arch")
    if _trial is not None:
        kernel, launch, answers = _trial
        if launch is not None and kernel == key.kernel:
            found = launch
        answers.append((key, found))
    return found


@contextmanager
def replaced(kernel: str = "", launch: Launch | None = None) -> Iterator[list[tuple[Key, Launch]]]:
    """In this context `kernel` runs with `launch`; without one nothing changes.

    Yields the list of the keys asked for since, each with the launch it got.
    """
    global _trial
    answers: list[tuple[Key, Launch]] = []
    outer, _trial = _trial, (kernel, launch, answers)
    try:
        yield answers
    finally:
        _trial = outer


def math_of(dtype: torch.dtype) -> str:
    """How PyTorch's settings have products computed now. Ask inside an op, which is not traced."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision_of(math: str) -> str:
    """The precision to pass to `tl.dot`; products of 16-bit operands are exact either way."""
    return "tf32" if math == "tf32" else "ieee"


def next_pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


@cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: any small number exercises the row loop
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


OFF_CUDA = 0  # `arch` there: what the interpreter's rows name


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def arch(device: torch.device) -> int:
    """Compute capability as triton names it: 90 for an H100 or H200; OFF_CUDA off CUDA."""
    return _capability(device) if device.type == "cuda" else OFF_CUDA
