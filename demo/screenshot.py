"""Take the picture of the page that stands in the README, in headless Chromium.

python -m demo.screenshot docs/demo.png --model runs/shakespeare-cpu
"""

import shutil
from pathlib import Path
from typing import Any

from demo.app import Models, build, launch, read_settings
from model.edge import exits

# As root there is no sandbox; the rest keeps a fresh profile from calling home.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def start_chromium(playwright: Any) -> Any:
    """The system's Chromium; playwright brings none.

    Raises:
        FileNotFoundError: there is none.
    """
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = next(found, None)
    if path is None:
        raise FileNotFoundError("screenshot: no Chromium here (Debian: apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


def main(args: list[str] | None = None) -> None:
    """`python -m demo.screenshot`."""
    import tyro

    def command(
        out: tyro.conf.Positional[Path],
        model: str | None = None,
        prompt: str = "ROMEO:\n",
        temperature: float = 0.7,
        tokens: int = 200,
        seed: int = 0,
    ) -> None:
        """Open the page, generate once, save what is seen.

        Args:
            out: PNG to write.
            model: Run or model folder; without it the newest under runs/.
            prompt: To type.
            temperature, tokens, seed: To set.
        """
        from playwright.sync_api import Error, sync_playwright  # of requirements-dev.txt

        read_settings(prompt, temperature, 0, 1.0, tokens, seed, 1)
        models = Models(model)
        models.get()
        with sync_playwright() as playwright:
            browser = start_chromium(playwright)
            _, url, _ = launch(build(models), prevent_thread_lock=True, quiet=True)
            page = browser.new_page(viewport={"width": 1240, "height": 980})
            try:
                page.goto(url)
                page.locator("#panel .run").wait_for()
                for name, value in {"temperature": temperature, "length": tokens}.items():
                    field = page.locator(f"#{name} input[type=number]")
                    field.fill(str(value))
                    field.press("Tab")
                page.locator("#seed input").fill(str(seed))
                page.locator("#prompt textarea").fill(prompt)
                page.locator("#go").click()
                page.locator("#status .done").wait_for(timeout=300_000)
                page.wait_for_timeout(1000)  # a border fades
                out.parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=out)
            except Error as error:
                raise OSError(f"screenshot: {error}") from None
        print(f"{out}: {out.stat().st_size:,} bytes")

    with exits():
        tyro.cli(command, prog="python -m demo.screenshot", args=args)


if __name__ == "__main__":
    main()
