"""The Triton interpreter made fit to judge kernels: right bfloat16, a sanitizer on every launch.

`install()` must run before a kernel does, in a process that had TRITON_INTERPRET=1 before its first
`import triton`. It changes the interpreter in four ways:

bfloat16   The stock interpreter computes on the raw 16 bits as if they were integers and truncates
           on the way out. Here arithmetic happens in fp32 and rounds to nearest even.
bounds     Every address must lie inside a tensor that was passed to the launch.
races      Programs run one after another here and at once on a GPU. No program may write what
           another one read or wrote, nor read what another one wrote. Inside a program a lane may
           not touch what another lane wrote, nor overwrite what it read, without a barrier between.
garbage    A masked-off lane of a load without `other=` is undefined on a GPU and 0 in the stock
           interpreter. Here it is NaN (the largest value for integers).

Atomics are bounds-checked only.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter as triton_interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from training.numerics import precision

_Builder = triton_interpreter.InterpreterBuilder
_Handle = triton_interpreter.TensorHandle


class SanitizerError(AssertionError):
    """A kernel touched memory in a way that is undefined on a GPU."""


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 bit patterns (uint16)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of fp32 values, rounded to nearest even; a NaN stays one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _value(handle: Any) -> np.ndarray:
    return bf16_to_fp32(handle.data) if _is_bf16(handle) else handle.data


def _widened(handle: Any) -> Any:
    return _Handle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def fp32_to_tf32(values: Any) -> Any:
    """As tensor cores read fp32 where it was not rounded before: without the last 13 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


_truncates = False  # the interpreter's products are exact, whatever precision is asked for


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Inside, fp32 products that may be TF32 are what a GPU makes of them."""
    global _truncates
    _truncates = True
    try:
        with precision("tf32"):
            yield
    finally:
        _truncates = False


def _install_bf16() -> None:
    stock = {
        name: getattr(_Builder, name)
        for name in (
            "binary_op", "cast_impl", "create_dot", "create_fma", "create_fp_to_fp",
            "ternary_op", "unary_op",
        )
    }  # fmt: skip

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return stock["binary_op"](self, lhs, rhs, op)
        out = op(_value(lhs), _value(rhs))
        # Comparisons keep the operand dtype as their nominal type, as in the stock method.
        return _Handle(out if out.dtype == np.bool_ else fp32_to_bf16(out), lhs.dtype.scalar)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where or not _is_bf16(c):  # a selection moves bits and does not compute
            return stock["ternary_op"](self, a, b, c, op)
        return _Handle(fp32_to_bf16(op(_value(a), _value(b), _value(c))), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if not _is_bf16(arg):
            return stock["unary_op"](self, arg, op)
        return _Handle(fp32_to_bf16(op(_value(arg))), tl.bfloat16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return stock["create_fma"](self, x, y, z)
        return _Handle(fp32_to_bf16(_value(x) * _value(y) + _value(z)), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if _truncates and precision[0] == triton_interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (_Handle(fp32_to_tf32(x.data), x.dtype) for x in (a, b))
        return stock["create_dot"](self, _widened(a), _widened(b), d, *precision)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if to == tl.bfloat16 and not _is_bf16(src):
            return _Handle(fp32_to_bf16(src.data.astype(np.float32)), to)
        if _is_bf16(src) and to != tl.bfloat16:
            dtype = triton_interpreter._get_np_dtype(dst_type)
            return _Handle(bf16_to_fp32(src.data).astype(dtype), to)
        return stock["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        one_is_bf16 = _is_bf16(src) != (dst_type.scalar == tl.bfloat16)
        narrowest = min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
        truncates = rounding == triton_interpreter._ir.ROUNDING_MODE.RTZ
        if one_is_bf16 and narrowest >= 16 and not truncates:
            return cast_impl(self, src, dst_type)
        return stock["create_fp_to_fp"](self, src, dst_type, rounding)

    def get_bf16(self: Any, value: float) -> Any:
        return _Handle(fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def refusing_bf16(stock_apply: Any) -> Any:
        def apply_impl(self: Any, input: Any) -> Any:
            for x in input if isinstance(input, tuple) else (input,):
                if x.dtype.scalar == tl.bfloat16:
                    raise SanitizerError("reduction or scan in bfloat16: accumulate in fp32")
            return stock_apply(self, input)

        return apply_impl

    for method in (
        binary_op, ternary_op, unary_op, create_fma, create_dot,
        cast_impl, create_fp_to_fp, get_bf16,
    ):  # fmt: skip
        setattr(_Builder, method.__name__, method)
    for reduction in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        reduction.apply_impl = refusing_bf16(reduction.apply_impl)


def _install_scalar_index() -> None:
    """A loop bound is an array of one element, which numpy 2.4 refuses to turn into an int.

    Triton 3.7 does this itself; 3.6 does not.
    """
    stock = triton_interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)

        def index(self: Any) -> int:
            return int(self.handle.data.squeeze())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    triton_interpreter._patch_lang_tensor = patch_lang_tensor


def _install_one_patch() -> None:
    """Patch triton.language once a launch; stock, every call of a jitted helper does, in vain.

    That took a third of all time in the interpreter.
    """
    stock = triton_interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        if _running:
            if fn.__module__ in _running.patched:
                return None
            _running.patched.add(fn.__module__)
        return stock(fn)

    triton_interpreter._patch_lang = patch_lang


# A lane stamp is epoch << _LANE_BITS | lane code. A new program or a barrier starts a new epoch,
# which makes all stamps stale at no cost.
_LANE_BITS = 40
_EVERY_LANE = 1  # a scalar access: any thread of the program may be the one that performs it
_FIRST_LANE = 2
_SEVERAL = -1


class _Shadow:
    """Who touched each element of one storage during one launch. 0 means nobody."""

    def __init__(self, base: int, nbytes: int, unit: int):
        self.base, self.unit = base, unit
        num_elements = -(-nbytes // unit)
        self.writer = np.zeros(num_elements, np.int32)  # program + 1
        self.reader = np.zeros(num_elements, np.int32)
        self.lane_wrote = np.zeros(num_elements, np.int64)  # stamp
        self.lane_read = np.zeros(num_elements, np.int64)


class _Launch:
    """The tensors of the launch that is running, and what its programs did to them."""

    def __init__(self, arguments: dict[str, torch.Tensor]):
        self.patched: set[str] = set()  # modules for which triton.language has been patched
        self.spans: list[tuple[int, int, str, _Shadow]] = []
        self.epoch, self.program = 1, -1
        units: dict[int, int] = {}
        for t in arguments.values():
            base = t.untyped_storage().data_ptr()
            units[base] = min(units.get(base, 8), t.element_size())
        shadows: dict[int, _Shadow] = {}
        for name, t in arguments.items():
            storage = t.untyped_storage()
            base = storage.data_ptr()
            if base not in shadows:
                shadows[base] = _Shadow(base, storage.nbytes(), units[base])
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            end = t.data_ptr() + (last + 1) * t.element_size()
            self.spans.append((t.data_ptr(), end, name, shadows[base]))

    def touch(self, ptrs: Any, mask: Any, size: int, *, write: bool, atomic: bool = False) -> None:
        """Check and record one load or store of `size` bytes a lane."""
        program = _program()
        if program != self.program:
            self.program, self.epoch = program, self.epoch + 1
        address = np.ravel(ptrs.data).astype(np.int64)
        lanes = np.arange(address.size, dtype=np.int64) + _FIRST_LANE
        if address.size == 1:
            lanes[0] = _EVERY_LANE
        if mask is not None and not mask.data.all():
            active = np.broadcast_to(mask.data, ptrs.data.shape).ravel().astype(bool)
            address, lanes = address[active], lanes[active]
        if address.size == 0:
            return
        low, high = address.min(), address.max() + size
        for start, end, name, shadow in self.spans:  # nearly always one tensor holds all lanes
            if start <= low and high <= end:
                self._record(shadow, name, address, lanes, write=write, atomic=atomic)
                return
        outside = np.ones(address.shape, bool)
        for start, end, name, shadow in self.spans:
            here = (address >= start) & (address + size <= end) & outside
            if here.any():
                outside &= ~here
                self._record(shadow, name, address[here], lanes[here], write=write, atomic=atomic)
        if outside.any():
            self._out_of_bounds(address[outside], write)

    def _out_of_bounds(self, address: np.ndarray, write: bool) -> None:
        first = int(address[0])
        start, end, name, _ = min(
            self.spans, key=lambda s: min(abs(first - s[0]), abs(first - s[1]))
        )
        raise SanitizerError(
            f"out of bounds {'store' if write else 'load'} by program {self.program}, "
            f"{address.size} lanes: byte {first - start} of {name}, which has {end - start}"
        )

    def _record(self, shadow: _Shadow, name: str, address: np.ndarray, lanes: np.ndarray,
                *, write: bool, atomic: bool) -> None:  # fmt: skip
        if atomic:
            return
        at = (address - shadow.base) // shadow.unit
        me = self.program + 1
        verb = "writes" if write else "reads"

        wrote = shadow.writer[at]
        other = (wrote != 0) & (wrote != me)
        if other.any():
            raise SanitizerError(
                f"race: program {self.program} {verb} {name}, "
                f"already written by program {wrote[other][0] - 1}"
            )
        stamps = (self.epoch << _LANE_BITS) | lanes
        if self._conflicts(shadow.lane_wrote[at], stamps, scalars_conflict=not write):
            raise SanitizerError(
                f"hazard: program {self.program} {verb} {name} where another lane of it has "
                "written, with no tl.debug_barrier() between"
            )
        read = shadow.reader[at]
        if not write:
            shadow.reader[at] = np.where((read == 0) | (read == me), me, _SEVERAL)
            before = shadow.lane_read[at]
            several = ((before >> _LANE_BITS) == self.epoch) & (before != stamps)
            shadow.lane_read[at] = np.where(several, self.epoch << _LANE_BITS, stamps)
            return
        other = (read != 0) & (read != me)
        if other.any():
            raise SanitizerError(
                f"race: program {self.program} writes {name}, already read by another program"
            )
        if self._conflicts(shadow.lane_read[at], stamps, scalars_conflict=True):
            raise SanitizerError(
                f"hazard: program {self.program} overwrites {name} after another lane of it has "
                "read it, with no tl.debug_barrier() between"
            )
        shadow.writer[at] = me
        shadow.lane_wrote[at] = stamps
        if (shadow.lane_wrote[at] != stamps).any():
            raise SanitizerError(
                f"race: two lanes of program {self.program} write one element of {name}"
            )

    def _conflicts(self, before: np.ndarray, stamps: np.ndarray, *, scalars_conflict: bool) -> bool:
        fresh = (before >> _LANE_BITS) == self.epoch
        conflict = fresh & (before != stamps)
        if scalars_conflict:  # one thread stores a scalar, every thread loads one
            conflict |= fresh & ((stamps & ((1 << _LANE_BITS) - 1)) == _EVERY_LANE)
        return bool(conflict.any())


_running: _Launch | None = None


def _program() -> int:
    (x, y, z), (_, num_y, num_z) = (
        triton_interpreter.interpreter_builder.grid_idx,
        triton_interpreter.interpreter_builder.grid_dim,
    )
    return (x * num_y + y) * num_z + z


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(argument, TensorDescriptor):
        argument = argument.base
    if isinstance(argument, torch.Tensor):
        if argument.numel():
            yield name, argument
    elif isinstance(argument, tuple):
        for i, item in enumerate(argument):
            yield from _tensors(f"{name}[{i}]", item)


def _garbage(shape: tuple[int, ...], dtype: Any) -> Any:
    np_dtype = triton_interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value: Any = 0x7FC0
    elif dtype.is_floating():
        value = np.nan if np.issubdtype(np_dtype, np.floating) else np.iinfo(np_dtype).max
    else:
        value = True if np_dtype == np.bool_ else np.iinfo(np_dtype).max
    return _Handle(np.full(shape, value, np_dtype), dtype)


def _install_sanitizer() -> None:
    stock_load, stock_store = _Builder.create_masked_load, _Builder.create_masked_store
    stock_rmw, stock_cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas
    stock_call = triton_interpreter.GridExecutor.__call__

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        dtype = ptrs.get_element_ty()
        if _running:
            _running.touch(ptrs, mask, max(1, dtype.primitive_bitwidth // 8), write=False)
        if other is None and mask is not None and not mask.data.all():
            other = _garbage(ptrs.data.shape, dtype)
        return stock_load(self, ptrs, mask, other, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _running:
            _running.touch(ptrs, mask, value.data.itemsize, write=True)
        return stock_store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _running:
            _running.touch(ptr, mask, value.data.itemsize, write=True, atomic=True)
        return stock_rmw(self, op, ptr, value, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, compare: Any, value: Any, *rest: Any) -> Any:
        if _running:
            _running.touch(ptr, None, value.data.itemsize, write=True, atomic=True)
        return stock_cas(self, ptr, compare, value, *rest)

    def create_barrier(self: Any) -> None:
        if _running:
            _running.epoch += 1

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _running
        passed = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        _running = _Launch(dict(t for name, arg in passed for t in _tensors(name, arg)))
        try:
            # A launch is one operation: a dispatch mode must not see the host copies inside it.
            with _disable_current_modes(), np.errstate(all="ignore"):
                stock_call(self, *args, **kwargs)
        except triton_interpreter.InterpreterError as error:
            cause = error.__cause__
            while isinstance(cause, triton_interpreter.InterpreterError):  # one per jitted helper
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            raise
        finally:
            _running = None

    for method in (
        create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas,
        create_barrier,
    ):  # fmt: skip
        setattr(_Builder, method.__name__, method)
    triton_interpreter.GridExecutor.__call__ = call


_installed = False


def install() -> None:
    """Apply all of it to this process; a second call does nothing.

    Raises:
        RuntimeError: triton was imported without TRITON_INTERPRET=1, so nothing is interpreted.
    """
    global _installed
    if not isinstance(tl.sum, triton_interpreter.InterpretedFunction):
        raise RuntimeError("interpreter: TRITON_INTERPRET=1 must be set before triton is imported")
    if not _installed:
        _installed = True
        _install_bf16()
        _install_scalar_index()
        _install_one_patch()
        _install_sanitizer()
