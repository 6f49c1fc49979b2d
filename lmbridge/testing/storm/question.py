"""One prompt, every word of which is its own, so that a foreign word in its answer shows.

Rule: belongs to the caller who asks it; others may only read it.
"""

from __future__ import annotations

import itertools
import time
from random import Random
from typing import Any

from lmbridge.messages import Response

LENGTHS = (1, 1, 2, 3, 5, 8, 20)  # words
TIMEOUTS = (None, None, 60.0, 60.0, 60.0, 60.0, 5.0, 5.0, 1.0, 0.3)  # seconds; None: the bridge's, which is endless
TINY = (0.0, 0.001, 0.01, 0.05)

_numbers = itertools.count(1)


class Question:
    """What one call asks, and what its answer must be."""

    def __init__(self, chance: Random) -> None:
        number, length = next(_numbers), chance.choice(LENGTHS)
        kind = chance.random()
        if kind < 0.1:  # token ids, which the scripted engine echoes as they are
            ids = [number * 100 + place for place in range(length)]
            self.words = [str(one) for one in ids]
            self.prompt: Any = ids
        else:
            self.words = [f"w{number}.{place}" for place in range(length)]
            self.prompt = self.text if kind < 0.8 else [{"role": "user", "content": self.text}]
        self.limit = chance.randint(1, 3) if chance.random() < 0.1 else None
        self.timeout = chance.choice(TINY) if chance.random() < 0.04 else chance.choice(TIMEOUTS)
        self.priority = chance.randint(-2, 2) if chance.random() < 0.1 else 0
        self.request_id = f"own-{number}" if chance.random() < 0.1 else None
        self.deadline: float | None = None  # monotonic time, as of `options`
        self.left = False  # its caller cancelled it or closed what it was asked by: it may end without an answer

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call; its deadline counts from now."""
        options: dict[str, Any] = {}
        if self.timeout is not None:
            self.deadline = time.monotonic() + self.timeout
            options["timeout"] = self.timeout
        if self.priority:
            options["priority"] = self.priority
        if self.limit is not None:
            options["max_new_tokens"] = self.limit
        if self.request_id is not None:
            options["request_id"] = self.request_id
        return options

    def same_terms(self, other: Question) -> None:
        """Take the terms of another question that goes by the same call."""
        self.limit, self.timeout, self.deadline, self.request_id = other.limit, other.timeout, other.deadline, None

    def wrong_with(self, response: Response) -> str:
        """What is wrong with an answer to this question; "" when nothing is."""
        said = len(response.token_ids)
        if response.token_ids != list(range(1, said + 1)):
            return f"its tokens are not in order: {response.token_ids}"
        if response.finish_reason == "abort":
            return "" if self.begins_with(response.text) else f"a foreign answer: {response.text!r}"
        whole = len(self.words) if self.limit is None else min(self.limit, len(self.words))
        if response.text != " ".join(self.words[:whole]):
            return f"a foreign answer: {response.text!r}"
        if (said, response.usage.completion_tokens) != (whole, whole):
            return f"{said} tokens of {whole}, and {response.usage}"
        if response.finish_reason != ("stop" if whole == len(self.words) else "length"):
            return f"its finish_reason is {response.finish_reason!r}"
        if self.request_id not in (None, response.request_id):
            return f"its id is {response.request_id!r}"
        return ""

    def begins_with(self, text: str) -> bool:
        """Whether ``text`` may be the beginning of an answer to this question."""
        return " ".join(self.words).startswith(text)
