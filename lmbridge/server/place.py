"""One engine's place at the server: what it works on, whether it moves, and whether it has died.

Rule: server thread only, but for what others may read or call: ``standstill``, ``busy``, ``where``, and
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

FAIR_LOOKS = 3  # at how many looks the engine must have gone on without a call before that says anything
MOST_BUSY = 120.0  # seconds that an engine may take nothing for by one word
ABORT_GRACE = 10.0  # seconds an engine may take to answer an abort before the place is given to somebody else


@dataclass(slots=True)
class _Sight:
    """What the looks at one call have shown."""

    heard: int  # Call.heard at the last look
    since: float  # when it was last seen to advance, or to be aborted
    shown: int | None = None  # Engine.progress at the last look, where the call was silent then
    passed: int = 0  # at how many looks since then the engine had gone on without it
    aborted: bool = False
    forgotten: bool = False  # was found to be; its abort may then go unanswered as well


class Place:
    """An engine and the calls it has begun.

    Times in here are those of the clock of whoever looks, which stands still while nobody can.

    Attributes:
        starting, closing: the tasks in which the supervisor has the engine start and close.
        stay: on its device; None before it is known which one that is. Left by whoever ends the engine, or gives it up.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: dict[Call, None] = {}  # begun and not ended
        self.starting: asyncio.Task[None] | None = None
        self.closing: asyncio.Task[None] | None = None
        self.stay: Stay | None = None
        self.progress = 0  # rises with everything the engine says or shows
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._size = 0  # how many calls the engine takes at once
        self._busy_until = 0.0  # on the monotonic clock: it takes none before; read by any thread
        self._quiet: asyncio.Event | None = None  # there while somebody waits for it
        self._seen = -1  # progress at the last look
        self._moves = False  # whether it had risen then
        self._moved = 0.0  # when progress was last seen, or none was due
        self._still = 0.0  # seconds from then to the last look
        self._sights: dict[Call, _Sight] = {}
        self._tells = True  # Engine.progress may be asked; it has not failed so far

    def listen(self) -> None:
        """Have the engine tell of its death, and of times at which it takes nothing.

        Raises:
            RuntimeError: it does not take that.
        """
        furnish(self.engine, on_death=self.report_death, on_busy=self.report_busy)

    @property
    def room(self) -> int:
        """How many more calls the engine takes now."""
        if self.dead.done() or self.busy > 0:
            return 0
        return self._size - len(self.calls)

    def measure(self) -> Exception | None:
        """Look at what an engine that has started says of itself; gives back what is wrong with that."""
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
        """Hold nobody up on the device: the engine has died, or is about to be closed. Any thread."""
        if self.stay is not None:
            self.stay.stop()

    def move_out(self) -> None:
        """Give back what the engine had on the device; more than once does no harm. Any thread."""
        if self.stay is not None:
            self.stay.leave()

    def leave(self, call: Call) -> None:
        """A call has ended."""
        self.calls.pop(call, None)
        if self._quiet is not None and not self.calls:
            self._quiet.set()

    async def quiet(self) -> None:
        """Return when the engine works on nothing."""
        while self.calls:
            self._quiet = asyncio.Event()
            await self._quiet.wait()

    def die(self, cause: BaseException) -> None:
        """The engine cannot go on. The first cause counts."""
        if not self.dead.done():
            self.dead.set_result(cause)

    def report_death(self, cause: BaseException) -> None:
        """What the engine calls when it cannot go on: more than once, after its end and from any thread as well."""
        if not isinstance(cause, BaseException):
            cause = RuntimeError(f"{shown(cause)}")
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everybody was told
            if threading.get_ident() == self._thread_id:
                self.die(cause)
            else:
                self._loop.call_soon_threadsafe(self.die, cause)

    def report_busy(self, seconds: float) -> None:
        """What the engine calls when it takes nothing for a while; the sweep sees when that is over."""
        said = as_number(seconds)
        if said is None or said != said:
            logger.error("The engine %s is busy for %s, which are no seconds.", name_of(self.engine), shown(seconds))
            return
        self._busy_until = time.monotonic() + float(min(max(0, said), MOST_BUSY))

    @property
    def busy(self) -> float:
        """For how many seconds more the engine takes nothing. Any thread."""
        return self._busy_until and max(0.0, self._busy_until - time.monotonic())

    # --- whether it moves ---

    @property
    def standstill(self) -> float:
        """For how many seconds, as of the last look, the engine has made no progress with what it has; 0 without work.

        Any thread.
        """
        return self._still if self.calls else 0.0

    def stall(self, seconds: float) -> TimeoutError:
        """The cause of death of an engine that has stood still for so long."""
        where = self.where()
        return TimeoutError(f"no progress for {seconds:g} s (stall_timeout)" + (f"; {where}" if where else ""))

    def where(self) -> str:
        """Where the engine's own thread stands; "" where that is not known. Any thread."""
        try:
            return self.engine.where()
        except BaseException:  # it is asked when things go wrong, by threads that must not end
            logger.exception("The engine %s could not say where it stands.", name_of(self.engine))
            return ""

    def look(self, now: float) -> None:
        """See whether the engine moves, and with which of its calls; comes with every sweep."""
        self._moves = self.progress != self._seen
        self._seen = self.progress
        if self._moves or not self.calls or not self._sights:  # calls that were not seen before may have just begun
            self._moved = now
        self._still = now - self._moved
        self._sights = {call: self._look_at(call, now) for call in list(self.calls)}

    def forgotten(self, patience: float, now: float) -> list[Call]:
        """The calls with which the engine has not advanced for ``patience`` seconds while it did with others."""
        found: list[Call] = []
        if not self._moves:  # perhaps all of it stands still, which is not for one call to answer for
            return found
        for call, sight in self._sights.items():
            if not sight.aborted and sight.passed >= FAIR_LOOKS and now - sight.since > patience:
                sight.forgotten = True
                found.append(call)
        return found

    def unanswered(self, patience: float, now: float) -> list[Call]:
        """The aborted calls that the engine does not let go of, though it has gone on since or had forgotten them."""
        patience = min(patience / 2, ABORT_GRACE)  # before an engine that has nothing else to do is taken for dead
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
        """Whether the engine says that a silent call has advanced since the last look."""
        before, sight.shown = sight.shown, self._told(call)
        return before is not None and sight.shown is not None and sight.shown != before

    def _told(self, call: Call) -> int | None:
        if self._tells:
            try:
                shown = self.engine.progress(call.request.id)
                return None if shown is None else int(shown)
            except BaseException:  # no engine may take the loop with it
                self._tells = False
                logger.exception(
                    "The engine %s failed to tell its progress; it is not asked again.", name_of(self.engine)
                )
        return None
