"""Recipes for engines, and requests to swap them.

Rule: any thread; nobody holds a lock in here. Requests outlive a replaced server thread.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field

from lmbridge.crossing.status import Verdict
from lmbridge.device import Device
from lmbridge.engines import EngineFactory
from lmbridge.errors import LMBridgeError

STUCK = "The server thread was stuck and has been replaced. Request the swap again."


@dataclass(frozen=True)
class Recipe:
    """How to build the engine, its label, whether it can be rebuilt, and its device (None: ask the engine)."""

    build: EngineFactory
    label: str
    rebuildable: bool
    device: Device | None = None


@dataclass(eq=False)
class Swap:
    """A request to swap the engine; ``done`` reports to the requester."""

    recipe: Recipe
    overlap: bool
    timeout: float | None
    done: Verdict = field(default_factory=Verdict)


class Swaps:
    """The requested swaps of one bridge: one is under way, the others wait."""

    def __init__(self) -> None:
        self._waiting: deque[Swap] = deque()  # any thread; each step is atomic
        self._begun: deque[Swap] = deque()  # at most one, plus any of threads left behind; each step is atomic

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def ask(self, swap: Swap) -> None:
        self._waiting.append(swap)

    def withdraw(self, swap: Swap) -> bool:
        """Cancel a swap; False if it has begun."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(swap)
            return True
        return False

    def waits(self, swap: Swap) -> bool:
        """Whether it has not begun."""
        return swap in list(self._waiting)

    def fail_begun(self, error: LMBridgeError) -> None:
        """Fail the swap under way."""
        for swap in list(self._begun):
            swap.done.tell(error)

    def fail_all(self, error: LMBridgeError) -> None:
        """Fail all swaps."""
        self.fail_begun(error)
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().done.tell(error)

    # --- the server thread only ---

    def begin(self) -> Swap | None:
        """The next swap, now under way; None if it was withdrawn."""
        with contextlib.suppress(IndexError):
            swap = self._waiting.popleft()
            self._begun.append(swap)
            return swap
        return None

    def end(self, swap: Swap) -> None:
        """The swap is over."""
        self._begun.remove(swap)
