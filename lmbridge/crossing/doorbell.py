"""Wakes an event loop from any thread, once for any number of rings.

Rule: takes no lock and never blocks, so finalizers and signal handlers may ring too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Doorbell:
    """Wakes one loop, with at most one wake-up pending. Without a loop it is silent.

    It cannot stick for long: if a ringing thread is killed between raising the flag and calling the loop, the owner's
    sweep answers anyway and lowers the flag.
    """

    __slots__ = ("_loop", "_answer", "rung")

    def __init__(
        self, answer: Callable[[], None] = lambda: None, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._loop = loop
        self._answer = answer
        self.rung = False  # raised by any thread, lowered on the loop only

    def ring(self) -> None:
        """Make the loop answer soon. Any thread, finalizers and signal handlers too; takes no lock."""
        if self.rung or self._loop is None:
            return
        self.rung = True
        try:  # noqa: SIM105  contextlib.suppress costs as much as the rest of a ring
            self._loop.call_soon_threadsafe(self.answer)
        except (
            Exception
        ):  # the loop is closed, and whatever closed it settles every call; or it is a broken foreign loop
            pass

    def answer(self) -> None:
        """Answer, on the loop only. Lowers the flag first, so that later news rings again."""
        self.rung = False
        self._answer()
