"""A device that several models share.

Rule: any thread. One object for each device and process, found by its name; what a fork takes along begins anew there.
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
        label: what its model is called.
        state: as ``Bridge.state``.
        bytes: of the device's memory that its models hold, or are about to; 0 where that is not known.
        pinned: others never unload it.
        weight: how much of the device it gets beside others.
        seconds: for which it has had the device; ``share``: of what all of these have had, 0 to 1.
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
    """What ``device.status()`` says of the bridges that are not closed.

    Attributes:
        name: as torch names it.
        memory: bytes for all models; None: without a limit, or not known before the first load.
        reserved: bytes that models hold, or are about to.
        free: the difference; None where ``memory`` is.
        parties: the bridges that have or had a model there, loaded or not.
        loading: the label of the model that is loading; None when none is.
        loads, unloads: models loaded so far, and unloaded for others or for being idle.
        computing: the label of the model that has the device at the moment; None when none has, or takes turns.
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
    """A ledger of memory and turns of computing, for all bridges that are given this device.

    A bridge that is given none uses ``Device.of`` its engine's. Build one yourself to set a limit, and give it to each
    of the bridges that are to share it.

    Args:
        name: as torch names it: ``"cpu"``, ``"cuda:0"``.
        memory: what models may have of it, in bytes or as ``"8GB"``, ``"8GiB"`` or ``"80%"``; None: what the device has
            on CUDA, no limit elsewhere.
        turns: compute one at a time, which keeps a stream's pace beside a large job. False lets all compute at once: on
            a CPU with cores for each of the models (``torch.set_num_threads``) both get more done, and a stream waits
            longer now and then.

    Raises:
        InvalidRequestError: one of them is none of these.
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
        """The device of that name that bridges share which are not given one of their own."""
        name = device_name(name)
        found = _shared.get(name)
        return found if found is not None else _shared.setdefault(name, cls(name))

    def status(self) -> DeviceStatus:
        """Who is there, who holds what, and who computes. Waits for nobody."""
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

    # --- for those who move in ---

    def admit(self, guest: Guest, weight: float, pinned: bool) -> Tenant:
        """A bridge that is to have its model here. It stays for as long as it is held by somebody else."""
        tenant = Tenant(guest, self.turns.lane(weight), pinned)
        self._tenants.add(tenant)
        return tenant

    def find_limit(self, only_if_cheap: bool = False) -> None:
        """See how much memory there is. May take seconds the first time, where torch is asked of a GPU."""
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
    """In the child: its parent's threads, models and locks are not there."""
    for device in list(_devices):
        device._begin()


os.register_at_fork(after_in_child=_after_fork)
