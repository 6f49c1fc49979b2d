"""Remembers the items of recent answers, for clients that send references instead of items.

Rule: plain data in, plain data out; any thread. Bounded in items, bytes and time; every step takes constant time,
however much is kept.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MOST_ITEMS = 10_000
MOST_BYTES = 32 * 2**20
SECONDS = 3600.0

_Key = tuple[str, str]
"""An account, and the id of an item sent to it."""


class _Kept(NamedTuple):
    text: bytes
    until: float


class Memory:
    """The items of an app's answers; drops the least recently used first.

    Args:
        most_items, most_bytes: limits for all accounts together.
        seconds: for how long to keep an unused item.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        most_items: int = MOST_ITEMS,
        most_bytes: int = MOST_BYTES,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_items = most_items
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()  # guarded by _lock, as is the next
        self._bytes = 0

    def remember(self, account: str, items: Iterable[dict[str, Any]]) -> None:
        """Keep the items sent to an account."""
        for item in items:
            text = json.dumps(_worth_keeping(item), separators=(",", ":")).encode()
            with self._lock:
                self._forget((account, item["id"]))
                self._keep((account, item["id"]), text)
                self._make_room()

    def find(self, account: str, item_id: str) -> dict[str, Any] | None:
        """The item of that id sent to this account; None if unknown, or no longer kept."""
        key = account, item_id
        with self._lock:
            self._make_room()
            found = self._forget(key)
            if found is None:
                return None
            self._keep(key, found.text)
        item: dict[str, Any] = json.loads(found.text)
        return item

    # --- with the lock held ---

    def _keep(self, key: _Key, text: bytes) -> None:
        self._kept[key] = _Kept(text, self._clock() + self._seconds)
        self._bytes += len(text)

    def _forget(self, key: _Key) -> _Kept | None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= len(found.text)
        return found

    def _make_room(self) -> None:
        while self._kept:
            oldest = next(iter(self._kept))
            if self._fits() and self._kept[oldest].until > self._clock():
                return
            self._forget(oldest)

    def _fits(self) -> bool:
        return len(self._kept) <= self._most_items and self._bytes <= self._most_bytes


def _worth_keeping(item: dict[str, Any]) -> dict[str, Any]:
    """The item without its log-probabilities, which can be a hundred times as long as its text."""
    if not item.get("content"):
        return item
    parts = [{name: value for name, value in part.items() if name != "logprobs"} for part in item["content"]]
    return {**item, "content": parts}
