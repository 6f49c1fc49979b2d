"""A device that several models share: turns of computing on it, and who holds how much of its memory.

Rule: any thread; nobody waits for memory in here, and for turns only engines' own threads do. Nothing here knows a
server, a bridge or torch, which is asked for what it knows only when somebody else has imported it or needs it anyway.
"""

from __future__ import annotations

from lmbridge.device.device import Device, DeviceStatus, PartyStatus

__all__ = ["Device", "DeviceStatus", "PartyStatus"]
