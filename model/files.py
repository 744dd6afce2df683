"""Files that are written whole, or not at all, and JSON that may come from a stranger."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.edge import naming


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, in the same folder; it takes the place of `path` at the end.

    An error removes it and leaves `path` as it was. The mode is the umask's, whoever writes:
    tempfile and safetensors make files that nobody else can read.
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

    A str becomes UTF-8, and what UTF-8 has no word for, as in a file name, an escape.
    """
    with replacing(path) as partial:
        partial.write_bytes(
            data.encode(errors="backslashreplace") if isinstance(data, str) else data
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and isinstance(content := json.loads(path.read_bytes()), dict):
            return content  # of a pipe the end would never come
    return {}
