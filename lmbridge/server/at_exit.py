"""Closes unclosed bridges when the interpreter exits.

Rule: any thread registers, the exiting thread ends them; by then no non-daemon thread that could use them is running.
"""

from __future__ import annotations

import atexit
from typing import Protocol

from lmbridge.log import logger


class Running(Protocol):
    """A server that one of our threads runs."""

    @property
    def started(self) -> bool:
        """Whether it has started in this process."""

    def drop(self) -> bool:
        """Ask it to end, without waiting."""

    def close(self, drain: bool, timeout: float) -> None:
        """End it and wait."""


_running: dict[int, Running] = {}  # by id; added and removed by any thread, each in one atomic step


def remember(server: Running) -> None:
    """End this server at exit if it is still running."""
    _running[id(server)] = server


def forget(server: Running) -> None:
    """The server has ended."""
    _running.pop(id(server), None)


@atexit.register
def _close_all() -> None:
    left = [server for server in list(_running.values()) if server.started]
    for server in left:
        logger.debug("A Bridge is closed by the end of the program.")
        server.drop()  # signal all before waiting for the first
    for server in left:
        server.close(drain=False, timeout=0.0)
