"""Visitors of the page wait in a line, and each sees only the texts of their last press."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gradio as gr

from demo.texts import status_html

AT_ONCE = 2  # texts that are generated at the same time; further visitors wait in line
POLL_S = 0.1  # how often they look whether it is their turn


class Line:
    """Where visitors wait: some are served at once, the others in the order in which they came.

    All of it runs on the server's event loop. gradio's own way to cancel has a race: it ends
    whatever the visitor runs when the request arrives, even if that is already the next text.
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
            visit: The visitor's newest turn and the last that was stopped. Both are updated here.
            turn: Counts the presses of this visitor. A later press ends the earlier ones.
        """
        visit["newest"] = max(turn, visit["newest"])

        def ended() -> bool:
            return turn < visit["newest"] or turn <= visit["stopped"]

        visitor, told = object(), 0  # the place in line that the page shows
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
                        return  # the page shows a later turn already
                    yield update
            elif turn == visit["newest"]:
                yield gr.skip(), status_html("stopped", "done")
        finally:
            self._visitors.remove(visitor)
