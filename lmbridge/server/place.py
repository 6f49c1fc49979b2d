"""One engine's place at the server: its calls, whether it makes progress, and whether it has died.

Rule: server thread only, except what others may read or call: ``standstill``, ``busy``, ``where``, and
``report_death``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass

from lmbridge.crossing.call import Call
from lmbridge.engines.base import Engine
from lmbridge.log import logger, shown
from lmbridge.server.border import batch_size, check_tasks, furnish, name_of
from lmbridge.server.lodging import Stay
from lmbridge.values import as_number

FAIR_LOOKS = 3  # how many looks must find the engine progressing without a call before it counts as forgotten
MOST_BUSY = 120.0  # the longest that an engine may call itself busy at once, in seconds
ABORT_GRACE = 10.0  # seconds an engine may take to confirm an abort before its place is given to another call


@dataclass(slots=True)
class _Sight:
    """What repeated looks at one call have found."""

    heard: int  # Call.heard at the last look
    since: float  # when it last advanced or was aborted
    shown: int | None = None  # Engine.progress at the last look, if the call was silent then
    passed: int = 0  # how many looks since then found the engine progressing without it
    aborted: bool = False
    forgotten: bool = False  # found to be forgotten; its abort may go unanswered too


class Place:
    """An engine and the calls it has begun.

    Times here are the looker's LookClock, which stands still while the process is paused.

    Attributes:
        starting, closing: the supervisor's tasks that start and close the engine.
        stay: on its device; None until the device is known. Left when the engine ends or is left behind.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: dict[Call, None] = {}  # begun and not ended
        self.starting: asyncio.Task[None] | None = None
        self.closing: asyncio.Task[None] | None = None
        self.stay: Stay | None = None
        self.progress = 0  # rises with every delta or other sign of progress
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._size = 0  # how many calls the engine takes at once
        self._busy_until = 0.0  # monotonic: takes no calls before this; read by any thread
        self._quiet: asyncio.Event | None = None  # set while a task waits for it
        self._seen = -1  # progress at the last look
        self._moves = False  # whether it had risen then
        self._moved = 0.0  # when progress was last seen or not due
        self._still = 0.0  # seconds from then to the last look
        self._sights: dict[Call, _Sight] = {}
        self._tells = True  # Engine.progress has not failed so far

    def listen(self) -> None:
        """Let the engine report its death, and when it takes no calls.

        Raises:
            RuntimeError: it does not accept the callbacks.
        """
        furnish(self.engine, on_death=self.report_death, on_busy=self.report_busy)

    @property
    def room(self) -> int:
        """How many more calls the engine takes now."""
        if self.dead.done() or self.busy > 0:
            return 0
        return self._size - len(self.calls)

    def measure(self) -> Exception | None:
        """Check a started engine's attributes; returns the error, if any."""
        try:
            self._size = batch_size(self.engine)
            check_tasks(self.engine)
        except Exception as error:
            return error
        return None

    def move_in(self, stay: Stay) -> None:
        """Take a place on a device."""
        self.stay = stay

    def stop_computing(self) -> None:
        """Stop using the device: the engine has died or is about to be closed. Any thread."""
        if self.stay is not None:
            self.stay.stop()

    def move_out(self) -> None:
        """Give back the engine's share of the device; idempotent. Any thread."""
        if self.stay is not None:
            self.stay.leave()

    def leave(self, call: Call) -> None:
        """A call has ended."""
        self.calls.pop(call, None)
        if self._quiet is not None and not self.calls:
            self._quiet.set()

    async def quiet(self) -> None:
        """Return once the engine has no calls."""
        while self.calls:
            self._quiet = asyncio.Event()
            await self._quiet.wait()

    def die(self, cause: BaseException) -> None:
        """The engine cannot go on. The first cause counts."""
        if not self.dead.done():
            self.dead.set_result(cause)

    def report_death(self, cause: BaseException) -> None:
        """Called by the engine when it cannot go on: any number of times, after its end, from any thread."""
        if not isinstance(cause, BaseException):
            cause = RuntimeError(f"{shown(cause)}")
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everyone was told
            if threading.get_ident() == self._thread_id:
                self.die(cause)
            else:
                self._loop.call_soon_threadsafe(self.die, cause)

    def report_busy(self, seconds: float) -> None:
        """Called by the engine when it takes no calls for a while; the sweep sees when that is over."""
        said = as_number(seconds)
        if said is None or said != said:
            logger.error("The engine %s is busy for %s, not a number of seconds.", name_of(self.engine), shown(seconds))
            return
        self._busy_until = time.monotonic() + float(min(max(0, said), MOST_BUSY))

    @property
    def busy(self) -> float:
        """How many more seconds the engine takes no calls. Any thread."""
        return self._busy_until and max(0.0, self._busy_until - time.monotonic())

    # --- whether it makes progress ---

    @property
    def standstill(self) -> float:
        """Seconds without progress, as of the last look; 0 without work.

        Any thread.
        """
        return self._still if self.calls else 0.0

    def stall(self, seconds: float) -> TimeoutError:
        """The cause of death of an engine that stalled this long."""
        where = self.where()
        return TimeoutError(f"no progress for {seconds:g} s (stall_timeout)" + (f"; {where}" if where else ""))

    def where(self) -> str:
        """What the engine's own thread is executing; "" if unknown. Any thread."""
        try:
            return self.engine.where()
        except BaseException:  # called during failures, by threads that must not end
            logger.exception("The engine %s failed to report where it is stuck.", name_of(self.engine))
            return ""

    def look(self, now: float) -> None:
        """Check whether the engine makes progress, and on which calls; runs at every sweep."""
        self._moves = self.progress != self._seen
        self._seen = self.progress
        if self._moves or not self.calls or not self._sights:  # unseen calls may have just begun
            self._moved = now
        self._still = now - self._moved
        self._sights = {call: self._look_at(call, now) for call in list(self.calls)}

    def forgotten(self, patience: float, now: float) -> list[Call]:
        """Calls without progress for ``patience`` seconds while others progressed."""
        found: list[Call] = []
        if not self._moves:  # perhaps the whole engine stalls, which is no single call's fault
            return found
        for call, sight in self._sights.items():
            if not sight.aborted and sight.passed >= FAIR_LOOKS and now - sight.since > patience:
                sight.forgotten = True
                found.append(call)
        return found

    def unanswered(self, patience: float, now: float) -> list[Call]:
        """Aborted calls that the engine does not release although it has progressed since or forgotten them."""
        patience = min(patience / 2, ABORT_GRACE)  # sooner than an otherwise idle engine is taken for dead
        return [
            call
            for call, sight in self._sights.items()
            if sight.aborted and now - sight.since > patience and (sight.forgotten or sight.passed >= FAIR_LOOKS)
        ]

    def _look_at(self, call: Call, now: float) -> _Sight:
        sight = self._sights.get(call)
        if sight is None:
            return _Sight(call.heard, now, aborted=call.outcome is not None)
        if call.heard != sight.heard:
            sight.heard, sight.since, sight.shown, sight.passed = call.heard, now, None, 0
        elif self._shows(call, sight):
            self.progress += 1
            sight.since, sight.passed = now, 0
        elif self._moves:
            sight.passed += 1
        if call.outcome is not None and not sight.aborted:
            sight.aborted, sight.since, sight.passed = True, now, 0
        return sight

    def _shows(self, call: Call, sight: _Sight) -> bool:
        """Whether the engine reports progress on a silent call since the last look."""
        before, sight.shown = sight.shown, self._told(call)
        return before is not None and sight.shown is not None and sight.shown != before

    def _told(self, call: Call) -> int | None:
        if self._tells:
            try:
                shown = self.engine.progress(call.request.id)
                return None if shown is None else int(shown)
            except BaseException:  # no engine may end the loop
                self._tells = False
                logger.exception(
                    "The engine %s failed to report its progress; it will not be asked again.", name_of(self.engine)
                )
        return None
