"""The page in a real headless Chromium, the functions behind it, and the Space folder."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from model.sampling import Sampling
from model.text import generate_text
from model.tokenizer import get_encoding

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from demo import app, space  # noqa: E402 - they import gradio

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# As root there is no sandbox; the rest keeps a fresh profile from calling home.
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Sees every connection and name look-up of the server process, whoever makes it.
SERVER = """
import sys
from pathlib import Path
root, run, log = sys.argv[1:4]
sys.path.insert(0, root)
def hook(event, args):
    if event == "socket.connect":
        address = args[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            open(log, "a").write(f"connect {address}\\n")
    elif event == "socket.getaddrinfo":
        host = args[0]
        if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"localhost"):
            open(log, "a").write(f"look up {host!r}\\n")
sys.addaudithook(hook)
from demo.app import Models, build, launch
page = build(Models(Path(run)))
_, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
print("URL", url, flush=True)
page.block_thread()
"""


def make_run(folder: Path) -> GPT:
    """A run folder with a random model that needs some milliseconds a token, and a corpus that
    holds what the model answers to "Recite" at temperature 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=256))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.transformer.wte.weight[50257:].zero_()
    model.save_pretrained(folder / "model")
    greedy = Sampling(max_new_tokens=30, temperature=0.0)
    text = generate_text(model, get_encoding(), ["Recite"], greedy)[0]
    (folder / "corpus.txt").write_text("Before. " + text + " After.")
    rows = [{"step": i, "loss": 10.0 - i / 10} for i in range(50)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = {"trained_context": 64, "tokens_seen": 123_456, "train_loss": 5.1, "val_loss": 9.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"recipe": {"name": "a-test-recipe"}}))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    make_run(folder)
    return folder


# ---- the functions behind the page


DEFAULTS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0, "num_samples": 1,
}  # fmt: skip


def ask(models: app.Models, prompt: str, **changes: Any) -> list[tuple[str, str]]:
    return [*app.generate(models, prompt, **{**DEFAULTS, **changes})]


def plain(page: str) -> str:
    import html

    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_last_text_is_what_the_library_generates(run: Path):
    texts, status = ask(app.Models(run), "Hello", seed=5, top_k=40)[-1]
    sampling = Sampling(max_new_tokens=20, temperature=0.8, top_k=40, seed=5)
    expected = generate_text(GPT.from_pretrained(run), get_encoding(), ["Hello"], sampling)[0]
    assert plain(texts) == "Hello" + expected
    assert "20 tokens" in status
    assert "tokens/s" in status


def test_recited_text_is_marked(run: Path):
    texts, status = ask(app.Models(run), "Recite", temperature=0, max_new_tokens=30)[-1]
    assert "<mark>" in texts
    assert "100% stands verbatim" in status
    texts, status = ask(app.Models(run), "Something else", seed=3)[-1]
    assert "<mark>" not in texts
    assert "0% stands verbatim" in status


def test_text_is_escaped(run: Path):
    texts, _ = ask(app.Models(run), "<img src=x onerror=alert(1)>", max_new_tokens=1)[-1]
    assert "<img" not in texts
    assert "&lt;img" in texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and &gt;= 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -2}, "top_k"),
        ({"max_new_tokens": 0}, "max length must be 1 to 500, got 0"),
        ({"max_new_tokens": 10**6}, "max length must be 1 to 500"),
        ({"num_samples": 50}, "samples must be 1 to 4, got 50"),
        ({"seed": -1}, "seed must be"),
        ({"seed": None}, "every setting must be a number"),
        ({"top_k": "3"}, "every setting must be a number"),
    ],
)
def test_bad_settings(run: Path, change: dict[str, Any], message: str):
    with pytest.raises(gr.Error, match=message):
        ask(app.Models(run), "a", **change)


def test_prompts_too_long_or_empty(run: Path):
    with pytest.raises(gr.Error, match="has 4,001 characters, at most 4,000"):
        ask(app.Models(run), "x" * 4001)
    _, status = ask(app.Models(run), "one two " * 60, max_new_tokens=1)[-1]
    assert "only its last 64 are read" in status
    assert "20 tokens" in ask(app.Models(run), "")[-1][1]


def test_no_model_and_then_one(run: Path, tmp_path: Path):
    """The page may be opened before the training has ended."""
    models = app.Models(None, runs=tmp_path)
    assert "make train" in app.panel_html(models)
    with pytest.raises(gr.Error, match="make train"):
        ask(models, "a")
    shutil.copytree(run, tmp_path / "first")
    assert "a-test-recipe" in app.panel_html(models)
    assert ask(models, "a")
    named = app.Models(tmp_path / "nowhere")
    assert "no such file or folder" in app.panel_html(named)
    with pytest.raises(gr.Error, match="no such file or folder"):
        ask(named, "a")


def test_panel(run: Path):
    panel = app.panel_html(app.Models(run))
    assert "123,456" in panel
    assert "Memorisation" in panel  # 9.9 against about 5.1
    assert "<svg" in panel


def test_command_line_without_the_named_model(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        app.main(["--model", "nowhere"])
    assert stop.value.code == 2
    assert "no such file or folder: nowhere" in capsys.readouterr().err


# ---- the page in a browser


def start_server(script: list[str], cwd: Path, env: dict[str, str] | None = None):
    return subprocess.Popen(
        script, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    pytest.importorskip("playwright", reason="playwright is not installed")
    log = tmp_path_factory.mktemp("server") / "outside.log"
    process = start_server([sys.executable, "-c", SERVER, str(ROOT), str(run), str(log)], run)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("URL"):
            break
    else:
        pytest.fail("the server did not start:\n" + "".join(lines))
    yield lines[-1].split()[1], log
    process.terminate()
    process.wait(timeout=200)


@pytest.fixture(scope="module")
def browser(server: tuple[str, Path]) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Visitor:
    """One browser context with the page open."""

    def __init__(self, browser: Any, url: str):
        self.context = browser.new_context(viewport={"width": 1200, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator("#go").wait_for()
        self.page.locator("#panel svg").wait_for()

    def set(self, name: str, value: float) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def start(self, prompt: str) -> None:
        self.page.locator("#prompt textarea").fill(prompt)
        self.page.locator("#go").click()

    def texts(self) -> list[str]:
        return self.page.locator("#output .sample").all_inner_texts()

    def status(self) -> str:
        return self.page.locator("#status").inner_text()

    def wait_for(self, number: int) -> None:
        """Until the status line counts so many tokens."""
        self.page.wait_for_function(
            "n => parseInt((document.querySelector('#status').innerText.match(/(\\d+) tokens,/)"
            " || [0, 0])[1]) >= n",
            arg=number,
        )

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visitor(browser: Any, server: tuple[str, Path]) -> Iterator[Visitor]:
    visitor = Visitor(browser, server[0])
    yield visitor
    visitor.close()


def test_text_appears_and_grows(visitor: Visitor):
    visitor.set("length", 300)
    visitor.start("Once upon a time")
    lengths = []
    for number in (1, 80, 180, 300):
        visitor.wait_for(number)
        lengths.append(len(visitor.texts()[0]))
    assert visitor.texts()[0].startswith("Once upon a time")
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3]
    assert re.search(r"300 tokens, \d+ tokens/s", visitor.status())
    assert visitor.errors == []


def test_temperature_0_gives_the_same_twice(visitor: Visitor):
    visitor.set("length", 30)
    found = []
    for seed, temperature in ((1, 0), (2, 0), (1, 1.5), (2, 1.5)):
        visitor.set("temperature", temperature)
        visitor.set("seed", seed)
        for prompt in ("Another", "Recite"):  # so that no answer can be the one before
            visitor.start(prompt)
            visitor.page.wait_for_function(
                "prompt => document.querySelector('#output .prompt').innerText === prompt"
                " &&/^30 tokens,.*verbatim/.test("
                "document.querySelector('#status').innerText)",
                arg=prompt,
            )
        found.append(visitor.texts()[0])
        marks = visitor.page.locator("#output mark").count()
        assert (marks > 0) == (temperature == 0)  # the corpus holds the greedy answer
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_stop_freezes_the_text(visitor: Visitor):
    visitor.set("length", 500)
    visitor.start("Stop me")
    visitor.wait_for(20)
    visitor.page.locator("#stop").click()
    visitor.page.wait_for_timeout(500)  # what was on its way arrives
    frozen = visitor.texts()
    visitor.page.wait_for_timeout(1000)
    assert visitor.texts() == frozen
    assert int(re.findall(r"(\d+) tokens,", visitor.status())[0]) < 500
    visitor.set("length", 10)  # and the page still works
    visitor.start("Again")
    visitor.page.wait_for_function(
        "() => document.querySelector('#output').innerText.startsWith('Again')"
    )


def test_two_clients_at_once(browser: Any, server: tuple[str, Path], run: Path):
    """Both grow while the other does, and each gets what it would get alone."""
    visitors = [Visitor(browser, server[0]) for _ in range(2)]
    for i, visitor in enumerate(visitors):
        visitor.set("length", 120)
        visitor.set("seed", i)
    for i, visitor in enumerate(visitors):
        visitor.start(f"Client {i}:")
    for visitor in visitors:
        visitor.wait_for(20)
    assert "120 tokens" not in visitors[0].status()  # the second began before the first ended
    model = GPT.from_pretrained(run)
    for i, visitor in enumerate(visitors):
        visitor.wait_for(120)
        sampling = Sampling(max_new_tokens=120, seed=i)
        text = generate_text(model, get_encoding(), [f"Client {i}:"], sampling)[0]
        shown = visitor.page.locator("#output .sample").text_content()
        assert shown == f"Client {i}:{text}"
        assert visitor.errors == []
        visitor.close()


def test_nothing_leaves_the_machine(visitor: Visitor, server: tuple[str, Path]):
    """Runs last: the log covers all that the server did for the tests above."""
    url, log = server
    visitor.set("length", 5)
    visitor.start("<b>${1+1}</b> {{value}} <script>document.title = 'owned'</script>")
    visitor.wait_for(5)
    assert visitor.texts()[0].startswith("<b>${1+1}</b> {{value}} <script>")
    assert visitor.page.title() == "GPT-2, trained here"
    outside = [u for u in visitor.requests if not u.startswith((url, "data:", "blob:"))]
    assert outside == []
    assert len(visitor.requests) > 5
    assert not log.exists() or log.read_text() == ""
    assert "127.0.0.1" in url


# ---- the Space


def test_space_folder_runs_by_itself(run: Path, tmp_path: Path):
    """app.py starts in a process that sees only the folder and the installed packages."""
    out = tmp_path / "space"
    space.main([str(out), "--model", str(run), "--title", 'A "title": with marks'])
    front = (out / "README.md").read_text().split("---\n")[1]
    keys = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert keys["sdk"] == "gradio"
    assert keys["app_file"] == "app.py"
    assert keys["sdk_version"] == gr.__version__
    assert json.loads(keys["title"]) == 'A "title": with marks'
    pinned = (out / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pinned)
    assert any(line.startswith("torch==") for line in pinned)
    assert not [*out.rglob("__pycache__")]
    assert "context of 64 tokens" in (out / "README.md").read_text()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = start_server(
        [sys.executable, "app.py"], out, {"GRADIO_SERVER_PORT": port, "PYTHONPATH": ""}
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as answer:
                    config = json.loads(answer.read())
                break
            except OSError:
                assert process.poll() is None, process.stdout and process.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert config["title"] == "GPT-2, trained here"
    finally:
        process.terminate()
        process.wait(timeout=200)


def test_space_refuses_a_full_folder_and_a_missing_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("x")
    for args, message in (
        ([str(tmp_path), "--model", str(run)], "must be a new or empty folder"),
        ([str(tmp_path / "out"), "--model", str(tmp_path / "none")], "no such file or folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            space.main(args)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
