"""A bridge on a device: its share of time, and the memory its engines hold.

Rule: any thread; plain data. A device references its tenants weakly, so a dropped bridge holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lmbridge.device.turns import Lane


class Guest(Protocol):
    """What a device may ask of a bridge, on any thread; nothing here blocks."""

    @property
    def label(self) -> str:
        """Its model's name."""

    @property
    def state(self) -> str:
        """As ``Bridge.state``."""

    @property
    def idle_since(self) -> float | None:
        """When the last call ended, monotonic; None during calls, or if no model could be unloaded."""

    def ask_to_unload(self, why: str) -> None:
        """Ask it to unload its model if it is still idle."""


class Tenant:
    """One bridge on one device.

    Attributes:
        pinned: its model is never unloaded for others: as requested, or because it could not be reloaded.
    """

    def __init__(self, guest: Guest, lane: Lane, pinned: bool) -> None:
        self.guest = guest
        self.lane = lane
        self.pinned = pinned


class Holding:
    """The device memory that one engine holds or requests. Guarded by the ledger's lock.

    Attributes:
        size: bytes: estimated before the load, measured after it.
        since: when it began waiting for room, monotonic.
        wake: called, by any thread, when asking again may succeed.
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
