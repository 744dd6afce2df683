"""What a value from a file must be, derived from the types that declare it, and how it is checked.

A schema is one of
    Must(words, holds)    a single value
    {"name": schema}      an object with these names and no others; "name?" may be missing
    [schema]              an array of any length
    (schema, schema)      an array of exactly these
    Every(schema)         an object of any names that match its pattern

`of` derives it from a type: a dataclass, a TypedDict, or the type of a field. Where a type cannot
express it, a Must replaces it: Annotated[int, count(3)].
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from model.edge import is_int, is_real, one_line, quoted

MOST = 1 << 48  # the largest count of anything: rows, bytes, steps
LARGE = 3.4028234e38  # the largest fp32


class Mismatch(ValueError):
    """A value does not fit its schema; the message names it."""


@dataclass(frozen=True)
class Must:
    """A single value: what it must be in words, how to test that, and the bytes of a tensor."""

    words: str
    holds: Callable[[Any], bool]
    num_bytes: int = 0


@dataclass(frozen=True)
class Every:
    """An object in which every value fits `each` and every name matches `names`."""

    each: Any
    names: str = r"\w{1,64}"


def count(most: int) -> Must:
    return Must(f"a whole number from 0 to {most}", lambda v: is_int(v) and 0 <= v <= most)


COUNT = count(MOST)
ARRAY = Must("an array", lambda v: isinstance(v, list))
OBJECT = Must("an object", lambda v: isinstance(v, dict))
TEXT = Must("a text of at most 4096 characters", lambda v: isinstance(v, str) and len(v) <= 4096)
PLAIN = {
    int: COUNT,
    float: Must("a finite number", lambda v: is_real(v) and -LARGE <= v <= LARGE),
    str: TEXT,
    bool: Must("true or false", lambda v: isinstance(v, bool)),
    NoneType: Must("null", lambda v: v is None),
    list: ARRAY,
    dict: OBJECT,
}


def of(hint: Any) -> Any:
    """The schema of a type."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in PLAIN and not args:
        return PLAIN[kind]
    if kind in (Annotated, NotRequired):
        return next((extra for extra in args if isinstance(extra, Must)), None) or of(args[0])
    if kind is Literal:
        return Must(f"one of {', '.join(args)}", lambda v: isinstance(v, str) and v in args)
    if kind in (list, tuple):
        return [of(args[0])] if kind is list or ... in args else tuple(map(of, args))
    if kind is dict:
        return Every(of(args[1]))
    if kind in (Union, UnionType):  # a union of single values
        each = [of(arg) for arg in args]
        words = " or ".join(one.words for one in each)
        return Must(words, lambda v: any(one.holds(v) for one in each))
    optional = getattr(hint, "__optional_keys__", ())  # a TypedDict has them
    hints = get_type_hints(hint, include_extras=True)
    return {name + "?" * (name in optional): of(hint) for name, hint in hints.items()}


def tensor(like: Tensor, low: float = -LARGE, high: float = LARGE, nan: bool = False) -> Must:
    """A tensor with the dtype and shape of `like` and values from low to high, or NaN if `nan`."""
    dtype, shape = like.dtype, like.shape

    def holds(value: Tensor) -> bool:
        if value.dtype != dtype or value.shape != shape:
            return False
        least, most = torch.aminmax(value.nan_to_num(0, LARGE * 2, -LARGE * 2) if nan else value)
        return bool(least >= low) and bool(most <= high)

    bounds = f"values from {low:g} to {high:g}"
    values = "finite values" if (low, high) == (-LARGE, LARGE) else bounds
    words = f"{dtype} of shape {tuple(shape)} with {values}"
    return Must(words.removeprefix("torch."), holds, like.numel() * like.element_size())


def check(where: str, value: Any, schema: Any) -> None:
    """Raise Mismatch for the first part of `value` that does not fit; `where` names `value`."""
    if isinstance(schema, Must):
        if not schema.holds(value):
            raise Mismatch(f"{where} must be {schema.words}, got {_spelled(value)}")
        return
    check(where, value, ARRAY if isinstance(schema, list | tuple) else OBJECT)
    if isinstance(schema, Every):
        schema = {name: schema.each for name in value if re.fullmatch(schema.names, name)}
    if isinstance(schema, dict):
        known = {name.removesuffix("?"): inner for name, inner in schema.items()}
        missing = {name for name in schema if not name.endswith("?")} - value.keys()
        for what, names in (("lacks", missing), ("has unknown", value.keys() - known.keys())):
            if names:
                some = ", ".join(one_line(name, 80) for name in sorted(names)[:3])
                raise Mismatch(f"{where} {what} {some}, {len(names)} in all")
        inside = [(f"{where}: {name}", value[name], known[name]) for name in value]
    else:
        if isinstance(schema, tuple) and len(value) != len(schema):
            raise Mismatch(f"{where} must have {len(schema)} values, got {len(value)}")
        each = schema if isinstance(schema, tuple) else schema * len(value)
        inside = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(value, each, strict=True))]
    for name, inner, wanted in inside:
        check(one_line(name, 160), inner, wanted)


def _spelled(value: Any) -> str:
    if not isinstance(value, Tensor):
        return quoted(value)
    kind = f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    with suppress(RuntimeError):  # an empty tensor, or a rare dtype
        kind += f" with values from {value.min().item():g} to {value.max().item():g}"
    return kind
