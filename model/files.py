"""Files that are written whole, or not at all, and JSON that may come from a stranger."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.edge import naming

MAX_JSON_BYTES = 16 << 20  # a config has 1 kB; the index of many shards has some 100


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path in the same folder to write to; that file replaces `path` at the end.

    After an error it is removed, and `path` is as it was. Its mode is what the umask asks for,
    whatever writes it: tempfile and safetensors make files that nobody else can read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        with naming(path):
            yield partial
        with contextlib.suppress(OSError):  # some file systems keep no modes
            partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write all of `data`, or leave `path` as it was.

    A str is written as UTF-8; a character that UTF-8 cannot hold, such as half of a surrogate pair
    in a file name, is written as an escape.
    """
    with replacing(path) as partial:
        partial.write_bytes(
            data.encode(errors="backslashreplace") if isinstance(data, str) else data
        )


def read_regular(path: Path) -> str:
    """The text of a regular file; reading a pipe or a device might never end.

    Raises:
        OSError: it is another kind of file, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file of a model folder.

    Raises:
        ValueError: it is long, or not a JSON object.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"model: {path} has {size:,} bytes, the limit is {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} must hold a JSON object")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in any file; empty if there is no such file or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():  # reading a pipe would never end
            return read_json(path)
    return {}
