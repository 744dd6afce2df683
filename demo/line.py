"""Visitors of the page wait in a queue, and each sees only the texts of their last click."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gradio as gr

from demo.texts import status_html

AT_ONCE = 2  # texts generated at the same time; further visitors wait in the queue
POLL_S = 0.1  # how often they check whether it is their turn


class Line:
    """The queue of visitors: some are served at once, the others in order of arrival.

    All of it runs on the server's event loop. gradio's own cancellation has a race: it ends
    whatever the visitor runs when the request arrives, even if that is already the next text.
    """

    def __init__(self, at_once: int = AT_ONCE):
        self.at_once = at_once
        self._visitors: list[object] = []

    async def serve(
        self, generate: Callable[..., Iterator[tuple[str, str]]], visit: dict[str, int], turn: int
    ) -> AsyncIterator[tuple[Any, str]]:
        """One click on Generate: wait, then generate.

        Args:
            generate: Yields (texts, status) until the function passed as `ended` returns True.
            visit: The visitor's newest turn and the last stopped one. Both are updated here.
            turn: Number of this click. A later click of the visitor ends earlier ones.
        """
        visit["newest"] = max(turn, visit["newest"])

        def ended() -> bool:
            return turn < visit["newest"] or turn <= visit["stopped"]

        visitor, told = object(), 0  # the place in the queue that the page shows
        self._visitors.append(visitor)
        try:
            while (ahead := self._visitors.index(visitor) + 1 - self.at_once) > 0 and not ended():
                if ahead != told:
                    yield gr.skip(), status_html(f"place {ahead} in the queue")
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
