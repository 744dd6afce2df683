"""The page in a real headless Chromium, and over HTTP."""

import html
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from demo import app
from docs.screenshot import start_chromium
from tests.test_demo import DEFAULTS, ROOT, make_run

# Logs each connection and name look-up of the server process that leaves the machine.
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, log of what the process looked for outside)."""
    log = tmp_path_factory.mktemp("server") / "outside.log"
    make_run(run := log.parent / "run")
    command = [sys.executable, "-c", SERVER, str(ROOT), str(run), str(log)]
    # Uploads go to a folder that every user of the machine would share.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(log.parent)}
    out: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=run, env=env, text=True, **out)
    assert process.stdout
    lines = []
    for text in process.stdout:
        lines.append(text)
        if text.startswith("URL"):
            break
    else:
        pytest.fail("the server did not start:\n" + "".join(lines))
    yield lines[-1].split()[1], log
    process.terminate()
    process.wait(timeout=200)


@pytest.fixture(scope="module")
def browser(server: tuple[str, Path]) -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        try:
            browser = start_chromium(playwright)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield browser
        browser.close()


class Visitor:
    """One browser context with the page open."""

    def __init__(self, browser: Any, url: str, width: int = 1200):
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(200_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator("#go").wait_for()
        # Gradio shows a picture of its own there while it loads.
        self.page.locator("#panel svg[role=img]").wait_for()

    def set(self, name: str, value: float) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def start(self, prompt: str) -> None:
        self.page.locator("#prompt textarea").fill(prompt)
        self.page.locator("#go").click()

    def answer(self, prompt: str) -> str:
        """The finished text that `prompt` begins."""
        self.start(prompt)
        self.page.wait_for_function(
            "prompt => document.querySelector('#output .prompt').innerText === prompt"
            " && document.querySelector('#status .done')",
            arg=prompt,
        )
        return self.text()

    def text(self) -> str:
        return self.page.locator("#output .sample").first.inner_text()

    def status(self) -> str:
        return self.page.locator("#status .status").inner_text()

    def wait_for(self, number: int, prompt: str = "") -> None:
        """Until the text begins with `prompt` and the status line counts so many tokens."""
        self.page.wait_for_function(
            "([n, prompt]) => document.querySelector('#output').innerText.startsWith(prompt) &&"
            " parseInt((document.querySelector('#status').innerText.match(/(\\d+) tokens/)"
            " || [0, 0])[1]) >= n",
            arg=[number, prompt],
        )


@pytest.fixture
def visitor(browser: Any, server: tuple[str, Path]) -> Iterator[Visitor]:
    visitor = Visitor(browser, server[0])
    yield visitor
    visitor.context.close()
    assert visitor.errors == []


def test_text_appears_grows_and_nothing_leaves_the_machine(
    visitor: Visitor, server: tuple[str, Path]
):
    """In the browser every request goes to the server, and the server opens no connection."""
    url, log = server
    prompt = "<b>${1+1}</b> {{value}} <script>document.title = 'owned'</script>"
    visitor.set("length", 200)
    visitor.start(prompt)
    lengths = []
    for number in (1, 60, 120, 200):
        visitor.wait_for(number)
        lengths.append(len(visitor.text()))
    assert visitor.text().startswith(prompt)
    assert lengths == sorted(lengths)  # a busy browser may see two of the four at once
    assert lengths[0] < lengths[-1]
    assert re.search(r"200 tokens, \d+ tokens/s, seed \d+", visitor.status())
    assert visitor.page.title() == app.TITLE
    outside = [u for u in visitor.requests if not u.startswith((url, "data:", "blob:"))]
    assert outside == []
    assert len(visitor.requests) > 5
    assert not log.exists() or log.read_text() == ""
    assert "127.0.0.1" in url


def test_seeds_examples_and_errors_on_the_page(visitor: Visitor):
    visitor.set("length", 10)
    first, second = visitor.answer("Another"), visitor.answer("Another ")
    assert first != second[:7] + second[8:]  # a new seed each time
    visitor.page.locator("#seed input").fill("5")
    same = [visitor.answer("Another"), visitor.answer("Recite"), visitor.answer("Another")]
    assert same[0] == same[2] != same[1]
    assert "seed 5" in visitor.status()
    visitor.set("temperature", 0)
    visitor.answer("Recite")  # the corpus holds the greedy answer
    assert visitor.page.locator("#output mark").count() > 0
    visitor.page.locator("#examples").get_by_text("Of my own text").click()
    visitor.page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value === 'Of my own text'"
    )
    visitor.page.locator("#seed input").fill("-5")
    visitor.page.locator("#go").click()
    visitor.page.get_by_text("the seed must be a whole number or empty, got '-5'").wait_for()


def test_generate_right_after_stop_and_right_after_generate(visitor: Visitor):
    """However close the clicks are, the last one wins."""
    visitor.set("length", 500)
    for i, delay_ms in enumerate((0, 0, 10, 60)):
        visitor.start(f"First {i}")
        visitor.wait_for(5, f"First {i}")
        visitor.page.locator("#prompt textarea").fill(f"Second {i}")
        visitor.page.evaluate(
            "([stop, delay]) => { if (stop) document.querySelector('#stop').click();"
            " setTimeout(() => document.querySelector('#go').click(), delay) }",
            [i != 1, delay_ms],
        )
        visitor.wait_for(5, f"Second {i}")
        visitor.page.locator("#stop").click()
        visitor.page.locator("#status .done").wait_for()
        frozen = visitor.text()
        assert re.search(r"\d+ tokens, stopped", visitor.status())
        assert visitor.page.get_by_text("Error", exact=True).count() == 0
        visitor.page.wait_for_timeout(200)
        assert visitor.text() == frozen


def test_page_fits_a_phone(browser: Any, server: tuple[str, Path]):
    visitor = Visitor(browser, server[0], width=390)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.context.close()


# ---- over HTTP


def post(url: str, body: bytes, kind: str) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    return urllib.request.urlopen(request, timeout=300)


def test_files_are_refused(server: tuple[str, Path]):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body += b"1" * 100_000 + b"\r\n--x--\r\n"
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(f"{server[0]}gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert refused.value.code == 413


@pytest.mark.slow
def test_fifty_clients_over_http(server: tuple[str, Path]):
    call = f"{server[0]}gradio_api/call/generate"

    def ask(i: int) -> str:
        data = [None, 0, False, f"Client {i}", *{**DEFAULTS, "max_new_tokens": 5}.values()]
        with post(call, json.dumps({"data": data}).encode(), "application/json") as answer:
            event = json.loads(answer.read())["event_id"]
        with urllib.request.urlopen(f"{call}/{event}", timeout=100) as answer:
            return answer.read().decode()

    with ThreadPoolExecutor(50) as pool:
        answers = [*pool.map(ask, range(50))]
    for i, answer in enumerate(answers):
        assert f"Client {i}<" in html.unescape(answer)
        assert "5 tokens," in answer
        assert "error" not in answer
    assert any("place 20 in the queue" in answer for answer in answers)
