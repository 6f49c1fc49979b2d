"""A device shared by several models.

Rule: any thread. One object per device and process, found by name; a forked child starts afresh.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

from lmbridge.device.ledger import Ledger
from lmbridge.device.sizes import Limit, device_name
from lmbridge.device.tenant import Guest, Tenant
from lmbridge.device.turns import Turns
from lmbridge.errors import InvalidRequestError
from lmbridge.log import shown
from lmbridge.values import as_flag


@dataclass(frozen=True)
class PartyStatus:
    """One bridge on a device.

    Attributes:
        label: its model's name.
        state: as ``Bridge.state``.
        bytes: device memory that its models hold or have reserved; 0 if unknown.
        pinned: never unloaded for others.
        weight: its share of the device relative to others.
        seconds: how long it has held the device; ``share``: its fraction of all bridges' time, 0 to 1.
    """

    label: str
    state: str
    bytes: int
    pinned: bool
    weight: float
    seconds: float
    share: float


@dataclass(frozen=True)
class DeviceStatus:
    """A snapshot from ``device.status()`` of the bridges that are not closed.

    Attributes:
        name: as torch names it.
        memory: bytes for all models; None: unlimited, or unknown before the first load.
        reserved: bytes that models hold or have reserved.
        free: the difference; None if ``memory`` is None.
        parties: the bridges with a model on this device, loaded or not.
        loading: the label of the model being loaded, or None.
        loads, unloads: models loaded so far, and unloaded to make room or because they were idle.
        computing: the label of the model that holds the device now; None if none does, or there are no turns.
    """

    name: str
    memory: int | None
    reserved: int
    free: int | None
    parties: list[PartyStatus]
    loading: str | None
    loads: int
    unloads: int
    computing: str | None = None


class Device:
    """Shares memory and computing time among all bridges on this device.

    A bridge without a ``device`` uses ``Device.of`` its engine's device name. Build a Device yourself to set a limit,
    and pass it to each bridge that shares it.

    Args:
        name: the torch name: ``"cpu"``, ``"cuda:0"``.
        memory: what models may use, in bytes or as ``"8GB"``, ``"8GiB"`` or ``"80%"``; None: all of the device's memory
            on CUDA, no limit elsewhere.
        turns: compute one model at a time, which keeps a stream's pace beside a large job. False lets all compute at
            once: on a CPU with enough cores for each model (``torch.set_num_threads``) this raises throughput, but
            streams pause for longer now and then.

    Raises:
        InvalidRequestError: an argument is invalid.
    """

    def __init__(self, name: str = "cpu", *, memory: int | str | None = None, turns: bool = True) -> None:
        self.name = device_name(name)
        self._limit = Limit(memory)
        self._limit_known = False
        flag = as_flag(turns)
        if flag is None:
            raise InvalidRequestError(f"turns must be True or False, not {shown(turns)}.", "turns")
        self._take_turns = flag
        self._begin()
        _devices.add(self)

    @classmethod
    def of(cls, name: str) -> Device:
        """The shared device of that name, for bridges that are not given a Device."""
        name = device_name(name)
        found = _shared.get(name)
        return found if found is not None else _shared.setdefault(name, cls(name))

    def status(self) -> DeviceStatus:
        """Which bridges are here, what memory they hold, and which one computes. Never blocks."""
        self.find_limit(only_if_cheap=True)
        limit, reserved = self.ledger.limit, self.ledger.reserved
        tenants = [tenant for tenant in self._tenants if tenant.guest.state != "closed"]
        used = [(tenant, self.turns.used(tenant.lane)) for tenant in tenants]
        total = sum(seconds for _, seconds in used) or 1.0
        parties = [
            PartyStatus(
                tenant.guest.label,
                tenant.guest.state,
                self.ledger.of(tenant),
                tenant.pinned,
                tenant.lane.weight,
                seconds,
                seconds / total,
            )
            for tenant, seconds in used
        ]
        return DeviceStatus(
            self.name,
            limit,
            reserved,
            None if limit is None else limit - reserved,
            sorted(parties, key=lambda party: party.label),
            self.ledger.loading,
            self.ledger.loads,
            self.ledger.unloads,
            next((tenant.guest.label for tenant in tenants if self.turns.has(tenant.lane)), None),
        )

    def __repr__(self) -> str:
        return f"<Device {self.name}>"

    # --- for bridges ---

    def admit(self, guest: Guest, weight: float, pinned: bool) -> Tenant:
        """Add a bridge. It stays for as long as someone else holds a reference to the Tenant."""
        tenant = Tenant(guest, self.turns.lane(weight), pinned)
        self._tenants.add(tenant)
        return tenant

    def find_limit(self, only_if_cheap: bool = False) -> None:
        """Find out how much memory there is. The first time, torch may take seconds to query a GPU."""
        if self._limit_known or (only_if_cheap and self.name.startswith("cuda") and not self._limit.given):
            return
        self.ledger.limit = self._limit.of(self.name)
        self._limit_known = True

    def _begin(self) -> None:
        self.turns = Turns(self._take_turns)
        self.ledger = Ledger(self.name)
        self._tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._limit_known = False


_shared: dict[str, Device] = {}  # by name; each step is atomic
_devices: weakref.WeakSet[Device] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: the parent's threads, models and locks do not exist."""
    for device in list(_devices):
        device._begin()


os.register_at_fork(after_in_child=_after_fork)
