"""Makes the README's picture of the demo page, with headless Chromium.

python -m docs.screenshot runs/shakespeare-cpu docs/demo.png
"""

import shutil
import sys
from typing import Any

# Root has no sandbox. The other flags stop requests to Google.
FLAGS = (
    "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)


def start_chromium(playwright: Any) -> Any:
    """Start the system's Chromium, since playwright brings none; FileNotFoundError without one."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = next(found, None)
    if path is None:
        raise FileNotFoundError("screenshot: no Chromium here (Debian: apt-get install chromium)")
    args = [f"--{flag}" for flag in FLAGS.split()]
    return playwright.chromium.launch(executable_path=path, args=args)


def take(model: str, out: str) -> None:
    """Open the page on a model, generate once, save what is seen."""
    from playwright.sync_api import sync_playwright  # of requirements-dev.txt

    from demo.app import Models, build, launch

    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
        _, url, _ = launch(build(Models(model)), prevent_thread_lock=True, quiet=True)
        page = browser.new_page(viewport={"width": 1240, "height": 980})
        page.goto(url)
        page.locator("#panel .run").wait_for()
        temperature = page.locator("#temperature input[type=number]")
        temperature.fill("0.7")
        temperature.press("Tab")
        page.locator("#seed input").fill("0")
        page.locator("#prompt textarea").fill("ROMEO:\n")
        page.locator("#go").click()
        page.locator("#status .done").wait_for(timeout=300_000)
        page.wait_for_timeout(1000)  # until a border has faded
        page.screenshot(path=out)


if __name__ == "__main__":
    take(*sys.argv[1:])
