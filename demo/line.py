"""Visitors of the page wait in a line, and each sees no texts but those of the last press."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gradio as gr

AT_ONCE = 2  # texts that are generated at the same time; further visitors wait in line
POLL_S = 0.1  # how often they look whether it is their turn


def status_html(text: str, state: str = "") -> str:
    """The line below the texts; `state` is "done" with the last."""
    return f'<div class="status {state}">{text}</div>'


class Line:
    """Where visitors wait: some are served at once, the others in the order in which they came.

    All of it runs on the server's event loop. gradio's own queue cannot be left without a race: it
    ends whatever the visitor runs when the word arrives, be it the next text already.
    """

    def __init__(self, at_once: int = AT_ONCE):
        self.at_once = at_once
        self._visitors: list[object] = []

    async def serve(
        self, generate: Callable[..., Iterator[tuple[str, str]]], visit: dict[str, int], turn: int
    ) -> AsyncIterator[tuple[Any, str]]:
        """One press of Generate: wait, then generate.

        Args:
            generate: Gives (texts, status) until the function passed as `ended` says so.
            visit: The visitor's newest turn and the last that was stopped; changed here.
            turn: Counts the presses of this visitor. A later one ends those before.
        """
        visit["newest"] = max(turn, visit["newest"])

        def ended() -> bool:
            return turn < visit["newest"] or turn <= visit["stopped"]

        visitor, told = object(), 0
        self._visitors.append(visitor)
        try:
            while (ahead := self._visitors.index(visitor) + 1 - self.at_once) > 0 and not ended():
                if ahead != told:
                    yield gr.skip(), status_html(f"place {ahead} in the line")
                told = ahead
                await asyncio.sleep(POLL_S)
            if not ended():
                updates = generate(ended=ended)
                while (update := await asyncio.to_thread(next, updates, None)) is not None:
                    if turn < visit["newest"]:
                        return  # what is on the page belongs to a later turn
                    yield update
            elif turn == visit["newest"]:
                yield gr.skip(), status_html("stopped", "done")
        finally:
            self._visitors.remove(visitor)
