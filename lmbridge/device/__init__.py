"""A device shared by several models: turns of computing, and the memory each holds.

Rule: any thread; nothing here waits for memory, and only engines' own threads wait for turns. Nothing here knows a
server, a bridge or torch; torch is queried only if it is already imported or needed anyway.
"""

from __future__ import annotations

from lmbridge.device.device import Device, DeviceStatus, PartyStatus

__all__ = ["Device", "DeviceStatus", "PartyStatus"]
