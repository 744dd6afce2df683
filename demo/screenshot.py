"""Take the picture of the page that stands in the README, in headless Chromium.

python -m demo.screenshot docs/demo.png --model runs/shakespeare-cpu
"""

import shutil
import sys
from pathlib import Path

from demo.app import Models, build, launch

# As root there is no sandbox; the rest keeps a fresh profile from calling home.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def take(
    out: Path, model: Path | None, prompt: str, temperature: float, tokens: int, seed: int
) -> None:
    """Open the page, generate once, save what is seen.

    Raises:
        FileNotFoundError: no Chromium, or no model.
    """
    from playwright.sync_api import sync_playwright  # of requirements-dev.txt

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise FileNotFoundError("screenshot: no Chromium here (Debian: apt-get install chromium)")
    models = Models(model)
    models.get()
    _, url, _ = launch(build(models), prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1240, "height": 980})
        page.goto(url)
        page.locator("#panel .run").wait_for()
        values = {"temperature": temperature, "length": tokens, "seed": seed}
        for name, value in values.items():
            field = page.locator(f"#{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
        page.locator("#prompt textarea").fill(prompt)
        page.locator("#go").click()
        page.get_by_text(f"{tokens} tokens,").wait_for(timeout=120_000)
        page.wait_for_timeout(1000)  # the last look-up of recited parts, and the border's fade
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
        browser.close()


def main(args: list[str] | None = None) -> None:
    """`python -m demo.screenshot`."""
    import tyro

    def command(
        out: tyro.conf.Positional[Path],
        model: Path | None = None,
        prompt: str = "ROMEO:\n",
        temperature: float = 0.7,
        tokens: int = 200,
        seed: int = 0,
    ) -> None:
        """Take the README's picture of the page.

        Args:
            out: PNG to write.
            model: Run or model folder; without it the newest under runs/.
            prompt: To type.
            temperature, tokens, seed: To set.
        """
        take(out, model, prompt, temperature, tokens, seed)
        print(f"{out}: {out.stat().st_size:,} bytes")

    try:
        tyro.cli(command, prog="python -m demo.screenshot", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
