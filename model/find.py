"""Where a model is: in a run, a folder, a file or on the hub; and what other files are."""

from pathlib import Path

import torch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the files of sharded weights


def find_model(path: str | Path) -> Path:
    """The folder or .safetensors file that holds the weights.

    Args:
        path: A model folder, a run folder (its `model/` is used), a .safetensors file, or, if no
            such path exists, a model on the hub; see model/hub.py.

    Raises:
        FileNotFoundError: nothing is there, or it has no weights.
        ValueError: a file of another kind.
    """
    if path == "":
        raise ValueError("model: the path is empty; name a run or a model folder")
    name, path = str(path), Path(path)
    if not path.exists():
        from model import hub  # hub.py needs the names above

        if hub.is_name(name):
            return hub.download(name)
        raise FileNotFoundError(f"model: no such file or folder: {path}")
    if not path.is_dir():
        if path.suffix == ".safetensors" and path.is_file():
            return path
        raise ValueError(
            f"model: expected a folder or a .safetensors file, got {path}: {describe_file(path)}"
        )
    folders = (path, path / "model")
    for folder in folders:
        if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
            return folder
    files = [file for folder in folders for file in sorted(folder.glob("*.*"))]
    other = next((file for file in files if file.suffix in (*FOREIGN, ".bin")), None)
    raise FileNotFoundError(
        f"model: {path} has neither {WEIGHTS} nor {INDEX}, nor a folder model/ with one"
        + (f"; it has {other.name}: {describe_file(other)}" if other else "")
    )


def latest_model() -> Path:
    """The model folder written last under runs/.

    Raises:
        FileNotFoundError: there is none.
    """
    weights = [p for p in Path("runs").glob(f"*/model/{WEIGHTS}") if p.is_file()]
    if not weights:
        raise FileNotFoundError(
            "no model under runs/ yet: train one with `make train`, or name a folder with --model"
        )
    return max(weights, key=lambda p: p.stat().st_mtime).parent


def usable_device(command: str, device: str) -> str:
    """ "cpu" or "cuda"; "auto" is a GPU where there is one.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{command}: --device cuda, but torch sees no GPU here; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


_PICKLE = (
    "a pickle, which can run code when it is read; `.venv/bin/python -m model.hf import-nanogpt "
    "FILE --out DIR` converts a nanoGPT checkpoint; if you trust the file, load its folder with "
    "transformers and write safetensors with save_pretrained"
)
_CONVERT = f"; the library that wrote it can convert it, or look for {WEIGHTS} where it came from"
FOREIGN = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".pkl"), _PICKLE),
    ".h5": f"weights for TensorFlow{_CONVERT}",
    ".msgpack": f"weights for Flax{_CONVERT}",
    ".onnx": f"an ONNX graph{_CONVERT}",
    ".gguf": f"weights for llama.cpp{_CONVERT}",
}
# The first bytes of a file say more than its name.
_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; `git lfs pull` gets them",
    **dict.fromkeys((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"), _PICKLE),
    b"\x89HDF": FOREIGN[".h5"],
    b"GGUF": FOREIGN[".gguf"],
    b"<": "a web page; download the file itself",
}


def describe_file(file: Path) -> str:
    """What a file not in the safetensors format is, and what to do about it."""
    if not file.is_file():
        return "not a regular file"
    with open(file, "rb") as handle:
        start = handle.read(64)
    for signature, what in _SIGNATURES.items():
        if start.startswith(signature):
            return what
    return FOREIGN.get(file.suffix, "not in the safetensors format, or damaged")


def regular(file: Path, named: Path) -> Path:
    """`file`, if it is a regular file inside `named`, the folder that the user named.

    Links that leave it are not followed, except those of the hub's cache (snapshots/<revision>/
    beside blobs/).

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    if not file.exists():
        raise FileNotFoundError(f"model: no such file: {file}")
    target, folder = file.resolve(), named.resolve()
    cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if not (cached or folder in target.parents):
        raise ValueError(f"model: {file} is a link out of {named}; copy the file there")
    if not target.is_file():
        raise ValueError(f"model: {file} is not a regular file")
    return file
