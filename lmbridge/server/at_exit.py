"""Ends the bridges that nobody closed, when the interpreter ends.

Rule: known by any thread, ended by the one that ends the interpreter; by then no non-daemon thread runs that could use
them.
"""

from __future__ import annotations

import atexit
from typing import Protocol

from lmbridge.log import logger


class Running(Protocol):
    """Something that a thread of ours runs."""

    @property
    def started(self) -> bool:
        """Whether it runs in this process."""

    def drop(self) -> bool:
        """Have it end, without waiting for that."""

    def close(self, drain: bool, timeout: float) -> None:
        """End it, and wait for that."""


_running: dict[int, Running] = {}  # by id; entered and removed by any thread, each in one atomic step


def remember(server: Running) -> None:
    """End this one at exit, should it still run."""
    _running[id(server)] = server


def forget(server: Running) -> None:
    """It has ended."""
    _running.pop(id(server), None)


@atexit.register
def _close_all() -> None:
    left = [server for server in list(_running.values()) if server.started]
    for server in left:
        logger.warning("A Bridge was not closed; use `with Bridge(...)` or bridge.close().")
        server.drop()  # all of them, before the first is waited for
    for server in left:
        server.close(drain=False, timeout=0.0)
