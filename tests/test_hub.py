"""Models by their name: a server that answers as the hub does, and a fine-tuning from it."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import train
from model import GPT, GPTConfig, hub
from tests.test_train import events
from training import ending

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_test"


class Hub(NamedTuple):
    endpoint: str
    model: GPT
    asked: list[str]  # "GET /org/tiny/resolve/main/config.json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Repositories of one tiny model: whole, in shards, pickled, and one that needs a token."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=48, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(root / "org" / "tiny")
    for name in ("gpt2", "org/private"):
        shutil.copytree(root / "org" / "tiny", root / name)
    config = (root / "org" / "tiny" / "config.json").read_text()
    tensors = load_file(root / "org" / "tiny" / "model.safetensors")
    for name in ("sharded", "pickled"):
        (root / "org" / name).mkdir()
        (root / "org" / name / "config.json").write_text(config)
    (root / "org" / "pickled" / "pytorch_model.bin").touch()
    shards = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for shard in {*shards.values()}:
        part = {key: tensors[key] for key in tensors if shards[key] == shard}
        save_file(part, root / "org" / "sharded" / shard)
    index = root / "org" / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            repo, _, rest = self.path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            allowed = repo != "org/private" or self.headers["Authorization"] == f"Bearer {TOKEN}"
            checks = {
                "RepoNotFound": (root / repo).is_dir() and allowed,
                "RevisionNotFound": revision in ("main", "v1", COMMIT),
                "EntryNotFound": (root / repo / file).is_file(),
            }
            error = next((name for name, holds in checks.items() if not holds), None)
            self.send_response(404 if error else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            data = b"" if error else (root / repo / file).read_bytes()
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("ETag", f'"{repo.replace("/", "-")}-{file}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Hub(f"http://127.0.0.1:{server.server_port}", model, asked)
        server.shutdown()
        thread.join()


@pytest.fixture
def here(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """That server instead of the hub, an empty cache, no token, a working directory."""
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    hub.download.cache_clear()
    served.asked.clear()
    return served


@pytest.mark.parametrize("name", ["gpt2", "org/tiny", "org/tiny@v1", "org/sharded"])
def test_a_name_is_the_model_of_that_name(name: str, here: Hub, monkeypatch) -> None:
    model = GPT.from_pretrained(name)
    for key, value in here.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    asked = len(here.asked)
    assert GPT.from_pretrained(name).trained_context == 48
    assert len(here.asked) == asked  # a process asks once
    hub.download.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert GPT.from_pretrained(name).config == here.model.config  # from the cache
    assert len(here.asked) == asked
    files = [line.rpartition("/")[2] for line in here.asked if "/resolve/" in line]
    assert {Path(file).suffix for file in files} == {".json", ".safetensors"}
    assert "vocab.json" in files  # GPT.from_pretrained compares it with GPT-2's


def test_a_token_opens_what_is_private(here: Hub, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model of that name.*HF_TOKEN"):
        GPT.from_pretrained("org/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert GPT.from_pretrained("org/private").config == here.model.config


REFUSED = {
    "org/absent": "is no file or folder here, and {hub} shows no model of that name",
    "org/tiny@v2": "{hub} has no revision v2 of it",
    "org/pickled": "has no config.json of it or no weights in safetensors; of a model that",
    "offline/gpt2": "{hub} gave no answer that helps .*name a folder with config.json",
    "here/gpt2": "no such file or folder: here/gpt2",
    "./org/tiny": "no such file or folder: org/tiny",
    "org/tiny/model": "no such file or folder: org/tiny/model",
    "/org/tiny": "no such file or folder: /org/tiny",
    "gpt3": "no such file or folder: gpt3",
    "org/tiny@../main": "no such file or folder",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_said_in_one_line(name: str, here: Hub, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "offline/gpt2")
    Path("here").mkdir()
    with pytest.raises(FileNotFoundError, match=REFUSED[name].format(hub=here.endpoint)) as error:
        GPT.from_pretrained(name)
    assert "\n" not in str(error.value)
    assert name[0].isalpha() or not here.asked  # for a path no server is asked


def test_a_hub_without_its_library_is_said(here: Hub, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub, or name a folder"):
        GPT.from_pretrained("org/tiny")


def test_a_fine_tuning_starts_from_a_name(
    here: Hub,
    text: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its learning rate only makes it worse, so it keeps the weights it began with."""
    out, parameters = Path("run"), here.model.num_parameters()
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(ending, "report_run", lambda *_: None)
    recipe = "--steps 12 --eval-every 2 --max-lr 1 --warmup-steps 1 --patience 2 --dropout 0.2"
    flags = f"--init org/tiny@v1 --no-guard --dtype=fp32 --grad-accum-steps=1 {recipe}".split()
    assert train.main([*flags, "--data", str(text), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "recipe: finetune, model 124m,block_size=48,n_layer=1" in said
    assert f"init: org/tiny@v1, {parameters:,} parameters, trained at 48 positions, from " in said
    assert COMMIT in said
    (start,) = [line for line in said.splitlines() if "of org/tiny@v1 before training" in line]
    assert start.startswith("step     0 | validation loss 10.8")
    config = json.loads((out / "config.json").read_text())
    assert config["init"].endswith(COMMIT)
    recipe = config["recipe"]
    assert (recipe["block_size"], recipe["keep"], recipe["min_lr"]) == (48, "best", 0.0)
    assert recipe["model"].endswith("dropout=0.2")
    steps, others = events(out)
    assert len(steps) == 4
    assert [e["step"] for e in others if e["event"] == "eval"] == [0, 2, 4]
    assert "model/ holds the weights of step 0" in said
    for key, value in GPT.from_pretrained(out).state_dict().items():
        assert torch.equal(value, here.model.state_dict()[key]), key
