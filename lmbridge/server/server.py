"""The loop end: takes calls out of every channel, hands them to the engine in fair turns, and brings answers back.

Rule: everything below the banner runs on the server thread only, the thread that owns the loop and the engine. Above
it is the thread-safe face, which does no more than put something where the loop will look, and ring.

A call goes ``_arrive`` → ``_begin`` → ``_on_delta`` … → ``_finish``, and ``_finish`` happens exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from lmbridge.crossing.call import Call, closed_error, forgotten_error, log_end, lost_error, timeout_error
from lmbridge.crossing.channel import Channel, Closed
from lmbridge.crossing.doorbell import Doorbell
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.engines.base import engine_error
from lmbridge.errors import (
    EngineDeadError,
    ForkedError,
    InvalidRequestError,
    LMBridgeError,
    fresh,
)
from lmbridge.messages import Delta, Outcome
from lmbridge.metrics import Metrics
from lmbridge.server.place import Place
from lmbridge.server.turns import Turns

logger = logging.getLogger("lmbridge")

SWEEP_INTERVAL = 0.5  # seconds between two looks at what no bell announced
IDLE_CHANNELS = 64  # how many unused channels are kept for the next caller


_forks = 0  # how many forks lie between the first process and this one: asking the system takes longer


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Server:
    """Owns the loop, the channels and the living calls."""

    def __init__(self, gate: Gate, metrics: Metrics, stall_timeout: float | None) -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._forks = _forks
        self.thread_id: int | None = None  # set once, by the server thread
        self.gate = gate
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._bell = Doorbell(self.loop, self._answer)
        self.wakes = WakeChain(self.loop, self._bell.ring)
        self._rung: deque[Channel] = deque()  # appended by any thread, popped by the server thread; as the next
        self._aborted: deque[Call] = deque()
        self._lock = threading.Lock()
        # By id, weakly: a channel that its consumer has dropped disappears with the last call in it. Not a WeakSet,
        # which breaks when one thread looks while another drops. Added under _lock, as is the next.
        self._channels: dict[int, weakref.ref[Channel]] = {}
        self._closed: BaseException | None = None
        self._idle: deque[Channel] = deque()  # any thread; append and pop are atomic
        self.left_behind = False  # set by the host once this loop is stuck: be silent should it ever wake up
        self.loss: BaseException = TimeoutError("the server thread was stuck and has been replaced")  # set before that
        self._successor: Server | None = None  # who has taken over then
        self.heartbeat = time.monotonic()  # of the last sweep; read by the watchdog
        self.living: dict[str, Call] = {}  # server thread only, as are the rest; others may copy it to look
        self.place: Place | None = None  # of the engine that gets what comes now
        self.refusal: LMBridgeError | None = None
        self._turns = Turns()
        self._pump_due = False
        self._missing: set[Call] = set()  # as of the last sweep
        self._emptied: asyncio.Event | None = None  # there while somebody waits for it

    # --- any thread ---

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child process, whose thread does not exist."""
        return self._forks != _forks

    def check_process(self) -> None:
        """Raise ForkedError in a child of the process that this server runs in. Comes before every lock."""
        if self.forked:
            raise ForkedError(
                f"The bridge was started in process {self._pid}; its thread and model do not exist in this child. "
                "Build the Bridge after the fork (under gunicorn: in the worker, or without --preload)."
            )

    def lease(self) -> Channel:
        """A channel for one consumer.

        Raises:
            BridgeClosedError: the loop has ended.
        """
        try:
            return self._idle.pop()
        except IndexError:
            channel = Channel(wakes=self.wakes)
            self.register(channel)
            return channel

    def register(self, channel: Channel) -> None:
        """Make the loop answer for a channel that somebody built himself."""
        with self._lock:
            if self._closed is not None:
                raise closed_error(self._closed)
            key = id(channel)
            self._channels[key] = weakref.ref(channel, functools.partial(self._channels.pop, key))
        if self._successor is not None:  # it may have looked at our channels a moment ago
            self._successor.register(channel)

    def give_back(self, channel: Channel) -> None:
        """Return a channel all of whose calls have had the server's final word. Takes no lock.

        One that was left with a call in it is just dropped: it disappears with that call.
        """
        self._idle.append(channel)

    def submit(self, call: Call) -> None:
        """Send an admitted call to the loop.

        Raises:
            BridgeClosedError: the loop has ended.
        """
        try:
            call.channel.send(call)
        except Closed:
            raise self.closed_error() from None
        self._rung.append(call.channel)
        if not self._bell.rung:
            self.wakes.ring()

    def abort(self, call: Call) -> None:
        """Have the engine stop a call that its caller has settled. Takes no lock: finalizers use it."""
        self._aborted.append(call)
        self._bell.ring()

    def run_soon(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the loop; it is dropped when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function)

    # ================= the server thread only =================

    def close(self, cause: BaseException) -> None:
        """End every call and refuse the next, with ``cause`` chained. The loop need not run any more."""
        with self._lock:
            self._closed = cause
        self.gate.close()
        lost = list(self.living.values())
        self.living.clear()
        for call in lost:
            call.settle(closed_error(cause))
            self._metrics.ended(call.outcomes[0])
        for channel in self._alive():
            for call in channel.close():
                call.settle(closed_error(cause))
        self.wakes.close()

    def closed_error(self) -> LMBridgeError:
        """What a call ends with that finds the loop gone. Any thread."""
        return closed_error(self._closed or RuntimeError("the loop is not running"))

    def install(self, place: Place) -> None:
        """Hand what waits and what comes to this engine from now on."""
        self.place = place
        self.refusal = None
        self._pump()

    def vacate(self, place: Place) -> None:
        """Hand nothing more to this engine; what it has begun goes on, what waits goes on waiting."""
        if self.place is place:
            self.place = None

    def fail_begun(self, place: Place, cause: BaseException) -> None:
        """End what the dead engine had begun; what waits goes on waiting."""
        self.vacate(place)
        for call in [call for call in self.living.values() if call.place is place]:
            self._finish(call, lost_error(cause))

    def refuse(self, error: LMBridgeError) -> None:
        """End what waits, and every later call, with a copy of ``error``."""
        self.refusal = error
        for call in [call for call in self.living.values() if call.place is None]:
            self._finish(call, fresh(error))

    def end_all(self, error: LMBridgeError) -> None:
        """Abort what runs and end every call with a copy of ``error``."""
        for call in list(self.living.values()):
            call.settle(fresh(error))
            self._abort(call)
            if not call.ended:
                self._finish(call, fresh(error))

    def _alive(self) -> list[Channel]:
        """The channels somebody still holds."""
        # Not items(): the tuples it makes may set off the garbage collector, whose finalizers take entries out.
        references = list(self._channels.values())
        return [channel for reference in references if (channel := reference()) is not None]

    async def drained(self) -> None:
        """Return when no call lives."""
        while self.living:
            self._emptied = asyncio.Event()
            await self._emptied.wait()

    async def sweep(self) -> None:
        """Look, now and then, at what no bell announced: lost callers, deadlines, idle channels, forgotten calls."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            self.heartbeat = time.monotonic()
            try:
                self._find_lost()
                self._bell.answer()
                self._expire(time.monotonic())
                self._look_at_engines(time.monotonic())
                while len(self._idle) > IDLE_CHANNELS:
                    self._idle.popleft()
            except Exception:  # the backstop itself must not end
                logger.exception("The server's sweep failed; it goes on.")

    def abort_where(self, chosen: Callable[[Call], bool], error: LMBridgeError) -> None:
        """End the living calls that ``chosen`` picks, each with a copy of ``error``."""
        for call in [call for call in self.living.values() if chosen(call)]:
            if call.settle(fresh(error)):
                call.channel.signal(call)
                self._abort(call)

    def take_over(self, stuck: Server) -> None:
        """Go on where a server whose loop is stuck was left behind: its channels, and the calls that still wait.

        Runs on the new server's thread. Should the stuck one wake up, it finds that it was left behind, hands over
        what it has in hand (``_arrive``) and is silent.
        """
        stuck._successor = self
        stuck.run_soon(stuck.loop.stop)
        stuck.wakes.close()
        self._rung, self._aborted, self._idle = stuck._rung, stuck._aborted, stuck._idle
        for channel in stuck._alive():
            self.register(channel)
        for call in list(stuck.living.values()):
            if call.place is None:
                self._arrive(call)
            else:
                call.ended = True
                call.settle(lost_error(stuck.loss))
                self._metrics.ended(call.outcomes[0])
                call.channel.nudge(call)

    # --- arrivals ---

    def _answer(self) -> None:
        if self.left_behind:
            return
        self.wakes.held = True
        while self._rung:  # one entry for each call sent
            call = self._rung.popleft().take()
            if call is not None:
                self._arrive(call)
        while self._aborted:
            aborted = self._aborted.popleft()
            self._collect(aborted.channel)  # its caller may have been interrupted between put and ring
            self._abort(aborted)
        if self._turns.lanes:
            self._pump()
        self.wakes.start()

    def _collect(self, channel: Channel) -> None:
        while (call := channel.take()) is not None:
            self._arrive(call)

    def _arrive(self, call: Call) -> None:
        if self.living.get(call.request.id) is call:  # both a stuck server and its successor found it
            return
        if call.outcomes:  # its caller has given up meanwhile
            self._forget(call)
            return
        if call.request.id in self.living:
            error: LMBridgeError = InvalidRequestError(
                f"A request with the id {call.request.id!r} is running already; give each its own.", "request_id"
            )
        elif self.refusal is not None:
            error = fresh(self.refusal)
        else:
            self.living[call.request.id] = call
            place = self.place
            if place is not None and not self._turns.lanes and place.room > len(self._rung) and not self.left_behind:
                self._begin(call, place)  # there is room for all that come now: nobody has to wait for a turn
                return
            self._turns.push(call)
            if self.left_behind and self._successor is not None:  # this thread was slow rather than stuck
                self._successor.run_soon(functools.partial(self._successor._arrive, call))
            return
        self._say(call, error)

    # --- to the engine ---

    def _pump(self) -> None:
        """Begin waiting calls while the engine has room."""
        self._pump_due = False
        if self.left_behind:
            return
        while self._turns.lanes and (place := self.place) is not None and place.room > 0:
            self._begin(self._turns.pop(), place)

    def _pump_soon(self) -> None:
        """Pump after the engine's present step, so that one step's finished requests are replaced together."""
        if self._turns.lanes and not self._pump_due:
            self._pump_due = True
            self.loop.call_soon(self._pump)

    def _begin(self, call: Call, place: Place) -> None:
        self.gate.leave(call)
        call.place = place
        call.began = time.monotonic()
        place.load += 1
        request, engine = call.request, place.engine
        try:
            engine.check(request)
            request.context.run(engine.add_request, request, functools.partial(self._on_delta, call))
        except (
            EngineDeadError
        ) as death:  # it knew before it told: the call has not begun, and waits for the next engine
            place.leave()
            call.place = call.began = None
            self._turns.push(call)
            place.die(death.__cause__ or death)
        except LMBridgeError as error:
            self._finish(call, error)
        except BaseException as cause:  # SystemExit too: no engine may take the loop with it
            self._finish(call, engine_error(f"{engine.name} could not begin the request: {cause!r}.", cause))

    def _abort(self, call: Call) -> None:
        """Stop a settled call: at once where it only waits, through the engine where it runs."""
        if call.ended or self.living.get(call.request.id) is not call:
            self._forget(call)  # it may have been admitted and never sent
            return
        if call.place is None:
            assert call.outcome is not None
            self._finish(call, call.outcome)
            return
        try:
            call.request.context.run(call.place.engine.abort_request, call.request.id)
        except BaseException as cause:
            call.place.die(cause)  # an engine that cannot abort cannot be trusted with its batch

    def _expire(self, now: float) -> None:
        """End calls whose deadline has passed while nobody waits on them to notice."""
        for call in list(self.living.values()):
            deadline = call.request.deadline
            if deadline is not None and now > deadline and call.settle(timeout_error(call)):
                call.channel.signal(call)
                self._abort(call)

    def _look_at_engines(self, now: float) -> None:
        """See which of its calls each engine has forgotten, and whether one that was swapped out still moves.

        The engine at ``place`` is the watchdog's to judge, which notices a stall also when it blocks the loop.
        """
        begun: dict[Place, list[Call]] = {} if self.place is None else {self.place: []}
        for call in self.living.values():
            if call.place is not None:
                begun.setdefault(call.place, []).append(call)
        for place, calls in begun.items():
            place.look(calls, now)
            if self._stall_timeout is None:
                continue
            if place is not self.place and place.standstill(now) > self._stall_timeout:
                place.die(place.stall(self._stall_timeout))
                continue
            self._end_forgotten(place, self._stall_timeout, now)

    def _end_forgotten(self, place: Place, patience: float, now: float) -> None:
        name = place.engine.name
        for call in place.unanswered(patience, now):
            assert call.outcome is not None
            logger.warning("The engine %s does not let go of request %s, which was aborted.", name, call.request.id)
            self._finish(call, call.outcome)
        for call in place.forgotten(patience, now):
            if call.settle(forgotten_error(patience)):
                logger.warning("The engine %s has forgotten request %s, which is aborted.", name, call.request.id)
                call.channel.signal(call)
                self._abort(call)

    def _find_lost(self) -> None:
        """Take what has passed the gate and was not announced, and empty the gate of what never came.

        Their callers were killed between entering and ringing. A call that is missing at two sweeps in a row is taken
        for lost. Should its caller merely be slow, there is one more call in the queue than allowed.
        """
        for call in self.gate.inside():
            if self.living.get(call.request.id) is not call:
                self._collect(call.channel)
        missing = {call for call in self.gate.inside() if self.living.get(call.request.id) is not call}
        for call in missing & self._missing:
            self.gate.leave(call)
        self._missing = missing

    # --- from the engine ---

    def _on_delta(self, call: Call, delta: Delta) -> None:
        """The sink of one call."""
        if call.ended or self.left_behind:
            return
        place = call.place
        call.heard = place.progress = place.progress + 1  # type: ignore[union-attr]
        tokens = len(delta.token_ids)
        if call.first_token is None and (tokens or delta.text):
            call.first_token = time.monotonic()
        call.tokens += tokens
        if not call.outcomes:
            call.deltas.append(delta)
        if delta.error is not None:
            self._finish(call, delta.error)
        elif delta.finish_reason is not None:
            self._finish(call, call.finish(delta.finish_reason, delta.usage))
        elif call.streaming and not call.signalled:
            call.channel.signal(call)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        """The server's final word on a call it knew."""
        del self.living[call.request.id]
        if call.place is None:
            self._turns.remove(call)
        else:
            call.place.leave()
        if self._emptied is not None and not self.living:
            self._emptied.set()
        self._say(call, outcome)
        self._pump_soon()

    def _forget(self, call: Call) -> None:
        """The final word on a call that never got into the queue; its caller knows the outcome."""
        self.gate.leave(call)
        if not call.ended and call.outcome is not None:
            call.ended = True
            self._metrics.ended(call.outcome)

    def _say(self, call: Call, outcome: Outcome) -> None:
        if call.began is None:
            self.gate.leave(call)
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = call.request.id
        call.ended = True
        call.settle(outcome)
        self._metrics.ended(call.outcomes[0])
        call.channel.signal(call)
        if logger.isEnabledFor(logging.DEBUG):
            log_end(call)
