"""Ends the bridges that nobody closed, when the interpreter ends.

Rule: known by any thread, ended by the one that ends the interpreter; by then no non-daemon thread runs that could use
them.
"""

from __future__ import annotations

import atexit
import logging
from typing import Protocol

logger = logging.getLogger("lmbridge")


class Running(Protocol):
    """Something that a thread of ours runs."""

    @property
    def started(self) -> bool:
        """Whether it runs in this process."""

    def close(self, drain: bool, timeout: float) -> None:
        """End it."""


_running: dict[int, Running] = {}  # by id; entered and removed by any thread, each in one atomic step


def remember(server: Running) -> None:
    """End this one at exit, should it still run."""
    _running[id(server)] = server


def forget(server: Running) -> None:
    """It has ended."""
    _running.pop(id(server), None)


@atexit.register
def _close_all() -> None:
    for server in list(_running.values()):
        if server.started:
            logger.warning("A Bridge was not closed; use `with Bridge(...)` or bridge.close().")
            server.close(drain=False, timeout=0.0)
