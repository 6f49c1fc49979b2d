"""The end of the process waits for a batch under way, as it does for a model that generates.

Rule: the engine's worker thread. An interpreter that ends while a daemon thread is inside torch aborts the process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.transformers.runner import generating, still


class _Stay:
    def __init__(self) -> None:
        self._over = threading.Event()

    def halt(self, timeout: float) -> bool:
        """Wait until it is over; False if that takes longer."""
        return self._over.wait(timeout)

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def staying() -> Iterator[None]:
    """While something is computed.

    Raises:
        RuntimeError: the interpreter is ending; nothing may begin to compute.
    """
    stay: Any = _Stay()
    generating(stay)
    try:
        yield
    finally:
        still(stay)
        stay.end()
