"""Checkpoints of a stranger: the checksums are right, and what they vouch for is not.

Each is one valid checkpoint with one change, signed again. All must be refused in one line, before
the model, the optimizer, the disk or the terminal has seen anything of it.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT
from training import checkpoint, resume
from training.checkpoint import CheckpointError
from training.distributed import ALONE
from training.guard import Guard
from training.optim import configure_adamw
from training.plan import Choices, detect, make_plan
from training.recipes import Recipe
from training.state import Progress, capture, restore

RECIPE = Recipe(
    model="smoke,n_layer=1,n_head=1,n_embd=8,block_size=8", block_size=8, batch_size=1, max_steps=12
)
WTE = "transformer.wte.weight"
STEP = 7
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def sane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GPT(RECIPE.model_config)
    optimizer = configure_adamw(model, RECIPE)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    progress = Progress(STEP, 9, [(3, 5)], 100, [(4, 5.5)])
    plan = make_plan(RECIPE, detect("cpu"), Choices(ops="eager", dtype="fp32", compile=False))
    saved = capture(progress, model, optimizer, Guard("cpu"), RECIPE, plan, "abc")
    return checkpoint.write(tmp_path_factory.mktemp("sane"), saved)


def find(path: Path) -> checkpoint.Checkpoint | None:
    return resume.find(str(path), path, ALONE, RECIPE, "abc")


def replace(path: Path, data: bytes) -> None:
    path.unlink()  # it may share its blocks with the sane one
    path.write_bytes(data)


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = bool) -> None:
    """Write the manifest anew, with `change` applied to it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) < 1e9:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            entry.update(bytes=size, sha256=digest)
    change(manifest)
    digest = hashlib.sha256(checkpoint._canonical(manifest)).hexdigest()
    replace(folder / "manifest.json", checkpoint._canonical({**manifest, "sha256": digest}))


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return functools.partial(sign, change=change)


def text(name: str, data: bytes) -> Change:
    def apply(folder: Path) -> None:
        replace(folder / name, data)
        sign(folder)

    return apply


def state(*keys: str, to: Any) -> Change:
    """A value of state.json, where `keys` lead; Ellipsis takes it out."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_bytes())
        inner = functools.reduce(lambda v, key: v[key], keys[:-1], values)
        if to is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to
        text("state.json", json.dumps(values).encode())(folder)

    return apply


def tensors(group: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / f"{group}.safetensors"
        named = {name: t.clone() for name, t in load_file(path).items()}
        change(named)
        path.unlink()
        save_file(named, path)
        sign(folder)

    return apply


def moment(kind: str, to: torch.Tensor) -> Change:
    return tensors("optimizer", lambda t: t.update({f"{WTE}.{kind}": to}))


def poke(group: str, name: str, value: float) -> Change:
    """One number of one tensor."""
    return tensors(group, lambda t: t[name].view(-1)[-1:].fill_(value))


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else than a file in the place of one."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**11)


def rename(old: str, new: str) -> Change:
    return manifest(lambda m: m["files"].update({new: m["files"].pop(old)}))


BF16, NAN, INF = torch.bfloat16, float("nan"), float("inf")
WIDE, FLAT = (50304, 8), (50257 * 8,)
BAD: dict[str, Change] = {
    "step beyond the last": state("progress", "step", to=99),
    "step that is not the manifest's": state("progress", "step", to=6),
    "negative step": state("progress", "step", to=-1),
    "huge step": state("progress", "step", to=2**70),
    "step of text": state("progress", "step", to="7"),
    "step true": state("progress", "step", to=True),
    "step of a fraction": state("progress", "step", to=7.5),
    "step null": state("progress", "step", to=None),
    "no step": state("progress", "step", to=...),
    "negative position": state("progress", "position", to=-5),
    "huge position": state("progress", "position", to=10**30),
    "position of a float": state("progress", "position", to=1e300),
    "skip of nothing": state("progress", "skips", to=[[12, 12]]),
    "skip backwards": state("progress", "skips", to=[[5, 3]]),
    "skip of a circle": state("progress", "skips", to=[[1, 5], [5, 1]]),
    "skip of three": state("progress", "skips", to=[[1, 2, 3]]),
    "skip of text": state("progress", "skips", to=["ab"]),
    "skips 100,000 times the same": state("progress", "skips", to=[[3, 5]] * 100_000),
    "skips twice the same": state("progress", "skips", to=[[3, 5], [3, 5]]),
    "skips by the hundred thousand": state(
        "progress", "skips", to=[[i, i + 1] for i in range(10**5)]
    ),
    "skips an object": state("progress", "skips", to={"1": 2}),
    "log of 1e11 bytes": state("progress", "metrics_bytes", to=1e11),
    "log of 1e30 bytes": state("progress", "metrics_bytes", to=10**30),
    "evaluation of text": state("progress", "evaluations", to=[[1, "x"]]),
    "evaluation NaN": state("progress", "evaluations", to=[[1, NAN]]),
    "evaluation to come": state("progress", "evaluations", to=[[1, 2.0], [10**6, 1.0]]),
    "evaluation of one": state("progress", "evaluations", to=[[1]]),
    "progress a list": state("progress", to=[]),
    "no progress": state("progress", to=...),
    "something more": state("progress", "code", to="import os"),
    "a further part": state("more", to={}),
    "recipe a list": state("recipe", to=[["max_steps", 12]]),
    "recipe without steps": state("recipe", "max_steps", to=...),
    "recipe of text steps": state("recipe", "max_steps", to="12"),
    "recipe within a recipe": state("recipe", "model", to={"a": {"b": []}}),
    "recipe with a name that clears the screen": state("recipe", "\x1b[2J", to=1),
    "plan of a long text": state("plan", "device_name", to="x" * 100_000),
    "guard of text": state("guard", "in_a_row", to="3"),
    "guard before the start": state("guard", "rollbacks", to=-1),
    "guard of 10**9 rollbacks": state("guard", "rollbacks", to=10**9),
    "guard of 10**9 bad steps in a row": state("guard", "in_a_row", to=10**9),
    "guard of 10**5 bad rows": state("guard", "positions", to=[9] * 10**5),
    "guard of lists": state("guard", "positions", to=[[1]]),
    "guard without tensors": tensors("guard", dict.clear),
    "state a list": text("state.json", b"[]"),
    "state nested 100,000 deep": text("state.json", b"[" * 100_000),
    "state with a number of 10,000 digits": text("state.json", b'{"a":' + b"9" * 10_000 + b"}"),
    "state no UTF-8": text("state.json", b'{"\xff": 1}'),
    "state empty": text("state.json", b""),
    "config a list": text("config.json", b"[]"),
    "moment of another shape": moment("exp_avg", torch.zeros(3)),
    "moment flat": moment("exp_avg_sq", torch.zeros(50304 * 8)),
    "moment a scalar": moment("exp_avg", torch.zeros(())),
    "moment bf16": moment("exp_avg", torch.zeros(WIDE, dtype=BF16)),
    "moment of integers": moment("exp_avg", torch.zeros(WIDE, dtype=torch.int32)),
    "moment complex": moment("exp_avg", torch.zeros(WIDE, dtype=torch.complex64)),
    "moment not finite": poke("optimizer", f"{WTE}.exp_avg", INF),
    "variance NaN": poke("optimizer", f"{WTE}.exp_avg_sq", NAN),
    "variance negative": poke("optimizer", f"{WTE}.exp_avg_sq", -1.0),
    "step count of three": moment("step", torch.zeros(3)),
    "step count NaN": moment("step", torch.tensor(NAN)),
    "step count negative": moment("step", torch.tensor(-2.0)),
    "step count ahead": moment("step", torch.tensor(1e9)),
    "no moments": tensors("optimizer", dict.clear),
    "a moment less": tensors("optimizer", lambda t: t.pop(f"{WTE}.exp_avg")),
    "a kind of moment more": moment("max_exp_avg_sq", torch.zeros(WIDE)),
    "moment of no parameter": tensors("optimizer", lambda t: t.update(x=torch.zeros(1))),
    "weight NaN": poke("model", WTE, NAN),
    "weight of another shape": tensors("model", lambda t: t.update({WTE: torch.zeros(8)})),
    "weight flat": tensors("model", lambda t: t.update({WTE: t[WTE].reshape(FLAT)})),
    "weight of doubles": tensors("model", lambda t: t.update({WTE: t[WTE].double()})),
    "a weight less": tensors("model", lambda t: t.pop(WTE)),
    "a weight more": tensors("model", lambda t: t.update(x=torch.zeros(1))),
    "weight with a name of escape codes": tensors(
        "model", lambda t: t.update({"\x1b[2J": torch.zeros(1)})
    ),
    "generator short": tensors("rng", lambda t: t.update(cpu=t["cpu"][:5].clone())),
    "generator zero": tensors("rng", lambda t: t["cpu"].zero_()),
    "generator all ones": tensors("rng", lambda t: t["cpu"].fill_(255)),
    "generator of floats": tensors("rng", lambda t: t.update(cpu=t["cpu"].float())),
    "no generator": tensors("rng", lambda t: t.update(cuda0=t.pop("cpu")[:16].clone())),
    "generator of nothing": tensors("rng", lambda t: t.update(x=torch.zeros(1))),
    "guard window short": tensors("guard", lambda t: t.update(losses=torch.zeros(3))),
    "guard window infinite": poke("guard", "losses", INF),
    "guard count negative": tensors("guard", lambda t: t["count"].fill_(-1)),
    "guard count of a float": tensors("guard", lambda t: t.update(count=torch.tensor(1.0))),
    "weights a link": instead("model.safetensors", lambda p: p.symlink_to("/etc/passwd")),
    "weights a link to zeros": instead("model.safetensors", lambda p: p.symlink_to("/dev/zero")),
    "weights a pipe": instead("model.safetensors", os.mkfifo),
    "weights a folder": instead("model.safetensors", Path.mkdir),
    "weights of 100 GB of nothing": instead("model.safetensors", sparse),
    "weights absent": instead("model.safetensors", bool),
    "state a link": instead("state.json", lambda p: p.symlink_to("/etc/passwd")),
    "state a pipe": instead("state.json", os.mkfifo),
    "state of 100 GB of nothing": instead("state.json", sparse),
    "manifest a link": instead("manifest.json", lambda p: p.symlink_to("/etc/passwd")),
    "manifest a pipe": instead("manifest.json", os.mkfifo),
    "manifest of 100 GB of nothing": instead("manifest.json", sparse),
    "weights a pickle": text("model.safetensors", b"\x80\x04\x95\x10\x00\x00\x00."),
    "weights empty": text("model.safetensors", b""),
    "weights with a header of 2**63": text("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
    "weights from elsewhere": rename("model.safetensors", "../sane/model.safetensors"),
    "weights from the root": rename("model.safetensors", "/etc/passwd"),
    "weights with a backslash": rename("model.safetensors", "..\\model.safetensors"),
    "weights with a NUL": rename("model.safetensors", "model\0.safetensors"),
    "weights with escape codes": rename("model.safetensors", "\x1b[2Jl.safetensors"),
    "weights under another name": rename("model.safetensors", "modell.safetensors"),
    "code beside them": rename("guard.safetensors", "guard.py"),
    "a part less": manifest(lambda m: m["files"].pop("optimizer.safetensors")),
    "no state": manifest(lambda m: m["files"].pop("state.json")),
    "no config": manifest(lambda m: m["files"].pop("config.json")),
    "the manifest in itself": manifest(
        lambda m: m["files"].update({"manifest.json": m["files"]["state.json"]})
    ),
    "files a list": manifest(lambda m: m.update(files=[*m["files"]])),
    "bytes of text": manifest(lambda m: m["files"]["state.json"].update(bytes="many")),
    "version 3": manifest(lambda m: m.update(version=3)),
    "version of text": manifest(lambda m: m.update(version="2")),
    "version 1": manifest(lambda m: m.update(version=1)),
    "step of 9 digits": manifest(lambda m: m.update(step=10**8)),
    "another format": manifest(lambda m: m.update(format=["fused-gpt-checkpoint"])),
    "something more in the manifest": manifest(lambda m: m.update(run="rm -rf")),
}


def test_the_sane_one_is_taken(sane: Path) -> None:
    found = find(sane)
    assert found is not None
    assert found.step == STEP


@pytest.mark.parametrize("what", BAD)
def test_what_is_signed_is_checked_all_the_same(sane: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / sane.name
    shutil.copytree(sane, folder, copy_function=os.link)
    BAD[what](folder)
    with pytest.raises(CheckpointError) as refusal:
        find(folder)
    line = str(refusal.value)
    assert line.startswith(f"checkpoint {folder}")
    assert line.isprintable()  # one line, and no escape codes
    assert len(line) < 600


def test_a_link_among_checkpoints_is_passed_over(sane: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(sane, folder / "step-00000007")
    (folder / "step-00000009").symlink_to(sane)
    lines: list[str] = []
    found = checkpoint.newest_good(folder, lines.append)
    assert found is not None
    assert found.path == folder / "step-00000007"
    assert "step-00000009: a link" in lines[0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(folder)
    with pytest.raises(CheckpointError, match="a link"):
        find(tmp_path / "run")


def test_names_by_the_thousand_are_counted_and_not_printed(sane: Path) -> None:
    saved = checkpoint.read(sane)
    saved.state["recipe"] |= {f"extra_{i}": i for i in range(20_000)}
    lines = resume.check_recipe(saved, RECIPE, "abc", override=True)
    assert len(lines) < 50
    assert "19,960 more differ" in lines[-1]


@pytest.mark.parametrize("value", [None, 5, True, "", "tiny,n_layer=x"])
@pytest.mark.parametrize("name", ["model", "schedule"])
def test_a_recipe_that_is_none_can_be_overridden(sane: Path, name: str, value: Any) -> None:
    saved = checkpoint.read(sane)
    saved.state["recipe"][name] = value
    lines = resume.check_recipe(saved, RECIPE, "", override=True)
    assert any(line.startswith(f"resume: recipe overridden: {name} was") for line in lines)


def test_nothing_is_changed_by_a_checkpoint_that_is_refused(sane: Path) -> None:
    """As a person who calls `restore` without `find`."""
    saved = checkpoint.read(sane)
    saved.tensors["optimizer"][f"{WTE}.exp_avg"] = torch.zeros(3)
    model = GPT(RECIPE.model_config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"exp_avg must be float32 of shape \(50304, 8\)"):
        restore(saved, model, configure_adamw(model, RECIPE), None)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
