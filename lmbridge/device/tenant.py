"""A bridge on a device: its account of time, and what its engines hold of the memory.

Rule: any thread; plain data. A device holds its tenants weakly, so that a bridge that is gone holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lmbridge.device.turns import Lane


class Guest(Protocol):
    """What a device may ask of a bridge, on any thread; nothing of it waits."""

    @property
    def label(self) -> str:
        """What its model is called."""

    @property
    def state(self) -> str:
        """As ``Bridge.state``."""

    @property
    def idle_since(self) -> float | None:
        """When the last call ended, monotonic; None while there are calls, or no model that could be unloaded."""

    def ask_to_unload(self, why: str) -> None:
        """Have it unload its model if it is idle still."""


class Tenant:
    """One bridge on one device.

    Attributes:
        pinned: others never unload its model: it was asked for, or the model could not be loaded again.
    """

    def __init__(self, guest: Guest, lane: Lane, pinned: bool) -> None:
        self.guest = guest
        self.lane = lane
        self.pinned = pinned


class Holding:
    """What one engine holds of a device's memory, or asks for. Guarded by the ledger's lock.

    Attributes:
        size: bytes: as estimated before the load, as measured after it.
        since: when it began to wait for room, monotonic.
        wake: called, by any thread, when it may be worth while to ask again.
        passing: its engine is about to end, which frees this.
        measured: its engine is loaded.
    """

    def __init__(self, tenant: Tenant, label: str, size: int, wake: Callable[[], None] = lambda: None) -> None:
        self.tenant = tenant
        self.label = label
        self.size = size
        self.since = 0.0
        self.wake = wake
        self.passing = False
        self.measured = False
