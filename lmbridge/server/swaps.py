"""What an engine is built from, and the orders to exchange it.

Rule: any thread; nobody holds a lock in here. Orders outlive a server thread that is replaced.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field

from lmbridge.crossing.status import Verdict
from lmbridge.device import Device
from lmbridge.engines import EngineFactory
from lmbridge.errors import LMBridgeError

STUCK = "The server thread was stuck; ask for the swap again."


@dataclass(frozen=True)
class Recipe:
    """How to build the engine, what to call it, whether it can be built again, and where it runs: None asks it."""

    build: EngineFactory
    label: str
    rebuildable: bool
    device: Device | None = None


@dataclass(eq=False)
class Swap:
    """A request to exchange the engine; ``done`` tells whoever asked."""

    recipe: Recipe
    overlap: bool
    timeout: float | None
    done: Verdict = field(default_factory=Verdict)


class Swaps:
    """The swaps of one bridge that were asked for: one is under way, the others wait for it."""

    def __init__(self) -> None:
        self._waiting: deque[Swap] = deque()  # any thread; each step is atomic
        self._begun: deque[Swap] = (
            deque()
        )  # one, but for a thread that was left behind with its own; each step is atomic

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def ask(self, swap: Swap) -> None:
        self._waiting.append(swap)

    def withdraw(self, swap: Swap) -> bool:
        """Take back a swap; False when it has been begun."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(swap)
            return True
        return False

    def waits(self, swap: Swap) -> bool:
        """Whether it has not been begun."""
        return swap in list(self._waiting)

    def fail_begun(self, error: LMBridgeError) -> None:
        """Tell whoever waits for the swap that is under way that nothing will come of it."""
        for swap in list(self._begun):
            swap.done.tell(error)

    def fail_all(self, error: LMBridgeError) -> None:
        """Tell the same to everybody."""
        self.fail_begun(error)
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().done.tell(error)

    # --- the server thread only ---

    def begin(self) -> Swap | None:
        """The next swap, which is under way from now on; None when whoever asked does not wait any more."""
        with contextlib.suppress(IndexError):
            swap = self._waiting.popleft()
            self._begun.append(swap)
            return swap
        return None

    def end(self, swap: Swap) -> None:
        """It is not under way any more."""
        self._begun.remove(swap)
