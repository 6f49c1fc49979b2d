"""A remote API as somebody's SDK would offer it, with nobody remote behind it: it says what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

CONTEXT = 400  # words that it reads at most


class TooManyWordsError(Exception):
    """The prompt is longer than it reads."""


class OverloadedError(Exception):
    """It has no room now; ``retry_after`` says in how many seconds it will."""

    retry_after = 1.0


class ParrotClient:
    """Talks to the API. Belongs to the loop that it is used on."""

    def __init__(self, voice: str) -> None:
        self.voice = voice
        self.calls = 0

    async def ping(self) -> None:
        """Raises ConnectionError unless the API is there."""
        await asyncio.sleep(0)

    async def complete(self, prompt: str, most: int) -> AsyncIterator[str]:
        """At most so many words, one by one. Leaving the iterator ends the call."""
        words = prompt.split()
        if len(words) > CONTEXT:
            raise TooManyWordsError(f"{len(words)} words")
        if self.calls >= 16:
            raise OverloadedError
        self.calls += 1
        try:
            for word in words[:most]:
                await asyncio.sleep(0.001)
                yield word.upper() if self.voice == "loud" else word
        finally:
            self.calls -= 1
