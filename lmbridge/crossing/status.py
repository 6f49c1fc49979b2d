"""What everybody may see of the engine's life.

Rule: written by the server thread once that runs, read by anyone.
"""

from __future__ import annotations

import concurrent.futures
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from lmbridge.errors import LMBridgeError

State = Literal["new", "starting", "ready", "restarting", "draining", "failed", "closed"]


@dataclass
class Status:
    """The engine's state, and why it is in it."""

    state: State = "new"
    reason: str = ""  # why it is not ready, where there is more to say than the state
    restarts: int = 0
    ready: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    deaths: deque[float] = field(default_factory=deque)  # monotonic times; outlive a replaced server thread

    def loaded(self) -> None:
        self.state, self.reason = "ready", ""
        if not self.ready.done():
            self.ready.set_result(None)

    def died(self, cause: BaseException) -> None:
        self.state, self.reason = "restarting", f"the engine died: {cause!r}"

    def failed(self, error: LMBridgeError) -> None:
        self.state, self.reason = "failed", str(error)
        if not self.ready.done():
            self.ready.set_exception(error)
