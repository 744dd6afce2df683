"""What a value out of a file must be, written as data and checked in one walk.

A schema is one of
    Must(words, holds)    a single value
    {"name": schema}      an object with these names and no others; "name?" may be missing
    [schema]              an array of any length
    (schema, schema)      an array of exactly these
    Every(schema)         an object of any names that are like its pattern
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.edge import is_int, is_real, one_line, quoted

MOST = 1 << 48  # of any count: rows, bytes, steps
LARGE = 3.4028234e38  # the largest fp32


class Mismatch(ValueError):
    """A value is not as its schema says; the message names it."""


@dataclass(frozen=True)
class Must:
    """A single value: what it must be in words, the test of it, and bytes where it is a tensor."""

    words: str
    holds: Callable[[Any], bool]
    num_bytes: int = 0


@dataclass(frozen=True)
class Every:
    """An object of which every value is as `each` says, and every name like the pattern."""

    each: Any
    names: str = r"\w{1,64}"


OBJECT = Must("an object", lambda v: isinstance(v, dict))
ARRAY = Must("an array", lambda v: isinstance(v, list))


def count(most: int) -> Must:
    """A whole number from 0 to `most`."""
    return Must(f"a whole number from 0 to {most}", lambda v: is_int(v) and 0 <= v <= most)


COUNT = count(MOST)
NUMBER = Must("a finite number", lambda v: is_real(v) and -LARGE <= v <= LARGE)
TEXT = Must("a text of at most 4096 characters", lambda v: isinstance(v, str) and len(v) <= 4096)
SCALAR = Must(
    "a number, a text, true, false or null",
    lambda v: v is None or isinstance(v, bool) or NUMBER.holds(v) or TEXT.holds(v),
)


def tensor(
    like: Tensor,
    low: float = -LARGE,
    high: float = LARGE,
    nan: bool = False,
    also: Callable[[Tensor], bool] = lambda _: True,
) -> Must:
    """A tensor with the dtype and shape of `like`.

    Args:
        like: On any device, "meta" included.
        low, high: Every value is between them.
        nan: A value may be NaN too.
        also: A further test, of what has passed these.
    """
    dtype, shape = like.dtype, like.shape

    def holds(value: Tensor) -> bool:
        if value.dtype != dtype or value.shape != shape:
            return False
        least, most = torch.aminmax(value.nan_to_num(0, LARGE * 2, -LARGE * 2) if nan else value)
        return bool(least >= low) and bool(most <= high) and also(value)

    bounds = f"values from {low:g} to {high:g}"
    values = "finite values" if (low, high) == (-LARGE, LARGE) else bounds
    words = f"{dtype} of shape {tuple(shape)} with {values}"
    return Must(words.removeprefix("torch."), holds, like.numel() * like.element_size())


def check(where: str, value: Any, schema: Any) -> None:
    """Raise Mismatch for the first value that is not as `schema` says; `where` names `value`."""
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
    for name, inner, of in inside:
        check(one_line(name, 160), inner, of)


def _spelled(value: Any) -> str:
    if not isinstance(value, Tensor):
        return quoted(value)
    kind = f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    with suppress(RuntimeError):  # of an empty one, or of a rare dtype
        kind += f" with values from {value.min().item():g} to {value.max().item():g}"
    return kind
