"""A bridge on its devices: the memory its engines need, when they get it, and when they return it.

Rule: any thread, except ``move_in``, which is the server thread's. It waits for room on the loop, in slices, so that
deadlines, aborts and close() still work.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lmbridge.crossing.gate import Gate
from lmbridge.crossing.status import Status
from lmbridge.device import Device
from lmbridge.device.sizes import as_size, usual_device
from lmbridge.device.tenant import Holding, Tenant
from lmbridge.device.turns import Party, Turns
from lmbridge.engines.base import Engine
from lmbridge.engines.thread import EngineThread
from lmbridge.log import logger, shown
from lmbridge.server.border import device_said, furnish, name_of
from lmbridge.server.swaps import Recipe

ASK_AGAIN = 0.5  # seconds after which a load waiting for room asks again, woken or not
LOOK_AGAIN = 60.0  # least seconds between checks of a busy model: the end of its last call is reported, except in races

_NONE = object()

Wait = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Terms:
    """A bridge's settings for sharing a device; see ``Bridge``."""

    keep_alive: float | None = None
    pin: bool = False
    weight: float = 1.0


class Host(Protocol):
    """Can unload the model."""

    def ask_to_rest(self, why: str) -> None:
        """Unload the model if it is still idle. Any thread."""


class Stay:
    """One engine on its device, from before its start until its end. Any thread."""

    def __init__(self, device: Device, holding: Holding, turns: Turns) -> None:
        self._device = device
        self._ledger = device.ledger
        self.holding = holding
        self.party = Party(turns, holding.tenant.lane)

    def loaded(self, engine: Engine) -> None:
        """Record what the started engine holds. The server thread."""
        self._ledger.settle(self.holding, _footprint(engine))

    def stop(self) -> None:
        """The engine computes for nobody any more, and is about to be closed."""
        self.party.close()
        self._ledger.passes(self.holding)

    def leave(self) -> None:
        """The engine is gone or left behind; idempotent."""
        self.party.close()
        self._ledger.leave(self.holding)

    def count_unload(self) -> None:
        """Count a model unloaded to make room or because it was idle."""
        self._ledger.count_unload()


class Lodging:
    """One bridge on its devices: usually one; a swap may move it to another.

    Attributes:
        terms: the bridge's settings.
        host: who holds the engine now: the current server thread's supervisor.
        label: the current or next model.
        idle: when the last call ended or the engine was loaded, monotonic; written by the server thread.
        may_rest: whether the current engine could be loaded again; likewise.
    """

    def __init__(self, terms: Terms, status: Status, gate: Gate) -> None:
        self.terms = terms
        self.host: Host | None = None
        self.label = ""
        self.idle = 0.0
        self.may_rest = False
        self._status = status
        self._gate = gate
        self._tenants: dict[Device, Tenant] = {}  # the server thread adds; the end clears

    # --- asked by devices ---

    @property
    def state(self) -> str:
        return self._status.state

    @property
    def idle_since(self) -> float | None:
        """When the last call ended; None during calls, or if no model could be unloaded."""
        rests = self.may_rest and self._status.state == "ready" and not self._gate.calls
        return self.idle if rests else None

    def ask_to_unload(self, why: str) -> None:
        host = self.host
        if host is not None:
            host.ask_to_rest(why)

    # --- reported by the server ---

    def is_idle(self) -> None:
        """The last call has ended, or the engine was loaded without a call."""
        self.idle = time.monotonic()
        for device in list(self._tenants):
            device.ledger.stir()

    def rest_due(self) -> float | None:
        """Seconds until the model may have been idle for ``keep_alive``; None if it stays loaded."""
        keep = self.terms.keep_alive
        if keep is None or not self.may_rest or self._status.state != "ready":
            return None
        return max(keep, LOOK_AGAIN) if self._gate.calls else max(0.0, self.idle + keep - time.monotonic())

    @property
    def works(self) -> bool:
        """Whether ``keep_alive`` is still waiting for a call to end."""
        return self.terms.keep_alive is not None and bool(self._gate.calls)

    def end(self) -> None:
        """The server has ended."""
        self.may_rest = False
        self._tenants.clear()

    # --- the server thread ---

    async def move_in(
        self,
        engine: Engine,
        recipe: Recipe,
        keep: Callable[[Stay], None],
        unless_stopped: Wait,
        given_up: Callable[[], bool],
    ) -> bool:
        """Give an engine its turns, and wait for room for its model; whether there is room.

        Args:
            keep: receives the Stay, which must be left in any case.
            unless_stopped: ``Places.unless_stopped``.
            given_up: whether to stop waiting for room.

        Raises:
            EngineStartError: there can never be room.
            RuntimeError: the engine raised when asked or told.
        """
        asked = await _off_the_loop(engine, recipe, unless_stopped)
        if asked is None:
            return False
        device, size = asked
        tenant = self._tenant(device, recipe)
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(news.set)

        turns = device.turns if _computes_there(engine, recipe) else Turns(False)
        stay = Stay(device, Holding(tenant, recipe.label, size or 0, wake), turns)
        keep(stay)
        furnish(engine, party=stay.party)
        return size is None or await self._wait_for_room(device, stay.holding, news, unless_stopped, given_up)

    async def _wait_for_room(
        self,
        device: Device,
        holding: Holding,
        news: asyncio.Event,
        unless_stopped: Wait,
        given_up: Callable[[], bool],
    ) -> bool:
        before, told = self._status.reason, ""
        while True:
            news.clear()
            why = None if given_up() else device.ledger.ask(holding)
            if told and self._status.reason == told:  # the reason may have changed meanwhile
                self._status.holds(before)
            if not why:
                return why is not None
            if self._status.reason in (before, told):
                self._status.holds(why)
                told = why
            heard: asyncio.Future[Any] = asyncio.ensure_future(news.wait())
            await unless_stopped(heard, timeout=ASK_AGAIN)
            heard.cancel()

    def _tenant(self, device: Device, recipe: Recipe) -> Tenant:
        pinned = self.terms.pin or not recipe.rebuildable
        tenant = self._tenants.get(device)
        if tenant is None:
            tenant = self._tenants[device] = device.admit(self, self.terms.weight, pinned)
        tenant.pinned = pinned
        return tenant


async def _off_the_loop(engine: Engine, recipe: Recipe, unless_stopped: Wait) -> tuple[Device, int | None] | None:
    """The engine's device and the memory it needs there; None when it is time to stop.

    Engines without an estimate are not asked, which saves a thread.
    """
    if type(engine).estimate is Engine.estimate and (recipe.device is not None or not _chooses(engine)):
        return recipe.device or Device.of("cpu"), None
    thread = EngineThread("lmbridge estimate")
    asking = asyncio.ensure_future(thread.run(_ask, engine, recipe))
    try:
        await unless_stopped(asking)
    finally:
        thread.close()
        if not asking.done():
            asking.cancel()
    return asking.result() if asking.done() and not asking.cancelled() else None


def _computes_there(engine: Engine, recipe: Recipe) -> bool:
    """Whether it surely does: a function without a device may wait for the network or another bridge."""
    return recipe.device is not None or _chooses(engine) or type(engine).estimate is not Engine.estimate


def _ask(engine: Engine, recipe: Recipe) -> tuple[Device, int | None]:
    """Ask the engine; runs on a separate thread."""
    device = recipe.device or _device_of(engine)
    try:
        size = as_size(engine.estimate())
    except ImportError:  # loading will say what to install
        size = None
    except BaseException as cause:  # an engine without an estimate may still load
        logger.warning("The engine %s could not estimate its memory: %s", name_of(engine), shown(cause))
        size = None
    if size is not None:
        device.find_limit()
    return device, size


def _chooses(engine: Engine) -> bool:
    """Whether the engine can choose its device."""
    if device_said(engine, otherwise=_NONE) is not _NONE:
        return True
    with contextlib.suppress(BaseException):  # a user's signature may raise anything
        return "device" in inspect.signature(type(engine)).parameters
    return False


def _device_of(engine: Engine) -> Device:
    """The device of an engine built by the user's function."""
    said = device_said(engine)
    try:
        if said is not None and (isinstance(said, str) or type(said).__name__ == "device"):  # torch's own
            return Device.of(str(said))
        return Device.of(usual_device() if _chooses(engine) else "cpu")
    except BaseException as cause:  # such as a missing torch, which the engine reports better
        logger.debug("The device of the engine %s is unknown: %s", name_of(engine), shown(cause))
        return Device.of("cpu")


def _footprint(engine: Engine) -> int | None:
    try:
        return as_size(engine.footprint())
    except BaseException as cause:
        logger.warning("The engine %s could not report its memory: %s", name_of(engine), shown(cause))
        return None
