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
from collections import Counter, deque
from collections.abc import Callable

from lmbridge.admission import Gate, Turns
from lmbridge.channel import Call, Channel, Doorbell, Finish, Outcome
from lmbridge.engines.base import Engine, engine_error
from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    ForkedError,
    InvalidRequestError,
    LMBridgeError,
    RequestTimeoutError,
    fresh,
)
from lmbridge.messages import Delta, FinishReason, Timings, Usage

logger = logging.getLogger("lmbridge")

SWEEP_INTERVAL = 0.5  # seconds between two looks at what no bell announced
IDLE_CHANNELS = 64  # how many unused channels are kept for the next caller


class Server:
    """Owns the loop, the channels and the living calls."""

    def __init__(self, gate: Gate) -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self.thread_id: int | None = None  # set once, by the server thread
        self.gate = gate
        self._bell = Doorbell(self.loop, self._answer)
        self._rung: deque[Channel] = deque()  # appended by any thread, popped by the server thread; as the next
        self._aborted: deque[Call] = deque()
        self._lock = threading.Lock()
        # By id, weakly: a channel that its consumer has dropped disappears with the last call in it. Not a WeakSet,
        # which breaks when one thread looks while another drops. Added under _lock, as is the next.
        self._channels: dict[int, weakref.ref[Channel]] = {}
        self._closed: BaseException | None = None
        self._idle: deque[Channel] = deque()  # any thread; append and pop are atomic
        self.living: dict[str, Call] = {}  # server thread only, as are the rest; others may copy it to look
        self.engine: Engine | None = None
        self.refusal: LMBridgeError | None = None
        self._turns = Turns()
        self._load: Counter[Engine] = Counter()
        self._pump_due = False
        self._missing: set[Call] = set()  # as of the last sweep
        self._emptied = asyncio.Event()
        self._emptied.set()

    # --- any thread ---

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child process, whose thread does not exist."""
        return self._pid != os.getpid()

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
            channel = Channel()
            self.register(channel)
            return channel

    def register(self, channel: Channel) -> None:
        """Make the loop answer for a channel that somebody built himself."""
        with self._lock:
            if self._closed is not None:
                raise closed_error(self._closed)
            key = id(channel)
            self._channels[key] = weakref.ref(channel, functools.partial(self._channels.pop, key))

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
        call.channel.send(call)
        self._rung.append(call.channel)
        self._bell.ring()

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
        for channel in self._alive():
            for call in channel.close():
                call.settle(closed_error(cause))

    def closed_error(self) -> LMBridgeError:
        """What a call ends with that finds the loop gone. Any thread."""
        return closed_error(self._closed or RuntimeError("the loop is not running"))

    def install(self, engine: Engine) -> None:
        """Begin to hand requests to this engine."""
        self.engine = engine
        self._pump()

    def fail_engine(self, engine: Engine, cause: BaseException) -> None:
        """End what the dead engine had begun; what waits goes on waiting."""
        if self.engine is engine:
            self.engine = None
        for call in [call for call in self.living.values() if call.engine is engine]:
            error = EngineDeadError(f"The engine died while it worked on this request: {cause!r}. Send it again.")
            error.retryable = True
            error.__cause__ = cause
            self._finish(call, error)

    def refuse(self, error: LMBridgeError) -> None:
        """End what waits, and every later call, with a copy of ``error``."""
        self.refusal = error
        for call in [call for call in self.living.values() if call.engine is None]:
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
        found = []
        for key, reference in list(self._channels.items()):
            channel = reference()
            if channel is not None:
                found.append(channel)
            else:
                self._channels.pop(key, None)
        return found

    async def drained(self) -> None:
        """Return when no call lives."""
        await self._emptied.wait()

    async def sweep(self) -> None:
        """Look, now and then, at what no bell announced: killed ringers, deadlines nobody waits for, idle channels."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            try:
                for channel in self._alive():
                    self._collect(channel)
                self._bell.answer()
                self._expire(time.monotonic())
                self._reclaim_places()
                while len(self._idle) > IDLE_CHANNELS:
                    self._idle.popleft()
            except Exception:  # the backstop itself must not end
                logger.exception("The server's sweep failed; it goes on.")

    def abort_where(self, chosen: Callable[[Call], bool], error: LMBridgeError) -> None:
        """End the living calls that ``chosen`` picks, each with a copy of ``error``."""
        for call in [call for call in self.living.values() if chosen(call)]:
            if call.settle(fresh(error)):
                call.signal()
                self._abort(call)

    # --- arrivals ---

    def _answer(self) -> None:
        while self._rung:
            self._collect(self._rung.popleft())
        while self._aborted:
            call = self._aborted.popleft()
            self._collect(call.channel)  # its caller may have been interrupted between put and ring
            self._abort(call)
        self._pump()

    def _collect(self, channel: Channel) -> None:
        while (call := channel.take()) is not None:
            self._arrive(call)

    def _arrive(self, call: Call) -> None:
        if call.outcome is not None:  # its caller has given up meanwhile
            call.ended = True
            self.gate.leave(call)
            return
        if call.request.id in self.living:
            error: LMBridgeError = InvalidRequestError(
                f"A request with the id {call.request.id!r} is running already; give each its own.", "request_id"
            )
        elif self.refusal is not None:
            error = fresh(self.refusal)
        else:
            self.living[call.request.id] = call
            self._emptied.clear()
            self._turns.push(call)
            return
        self._say(call, error)

    # --- to the engine ---

    def _pump(self) -> None:
        """Begin waiting calls while the engine has room."""
        self._pump_due = False
        engine = self.engine
        while engine is not None and self._turns and self._load[engine] < engine.max_batch_size:
            call = self._turns.pop()
            assert call is not None
            self._begin(call, engine)
            engine = self.engine

    def _pump_soon(self) -> None:
        """Pump after the engine's present step, so that one step's finished requests are replaced together."""
        if self._turns and not self._pump_due:
            self._pump_due = True
            self.loop.call_soon(self._pump)

    def _begin(self, call: Call, engine: Engine) -> None:
        self.gate.leave(call)
        call.engine = engine
        call.began = time.monotonic()
        self._load[engine] += 1
        request = call.request
        logger.debug("begin %s of %s", request.id, request.client)
        try:
            engine.check(request)
            request.context.run(engine.add_request, request, functools.partial(self._on_delta, call))
        except LMBridgeError as error:
            self._finish(call, error)
        except BaseException as cause:  # SystemExit too: no engine may take the loop with it
            self._finish(call, engine_error(f"{engine.name} could not begin the request: {cause!r}.", cause))

    def _abort(self, call: Call) -> None:
        """Stop a settled call: at once where it only waits, through the engine where it runs."""
        if call.ended or self.living.get(call.request.id) is not call:
            self.gate.leave(call)  # it may have been admitted and never sent
            return
        if call.engine is None:
            assert call.outcome is not None
            self._finish(call, call.outcome)
            return
        try:
            call.request.context.run(call.engine.abort_request, call.request.id)
        except BaseException as cause:
            call.engine.on_death(cause)  # an engine that cannot abort cannot be trusted with its batch

    def _expire(self, now: float) -> None:
        """End calls whose deadline has passed while nobody waits on them to notice."""
        for call in list(self.living.values()):
            deadline = call.request.deadline
            if deadline is not None and now > deadline and call.settle(timeout_error(call)):
                call.signal()
                self._abort(call)

    def _reclaim_places(self) -> None:
        """Empty the gate of calls that never came: their callers were killed between entering and sending.

        A call that is missing at two sweeps in a row is taken for lost. Should its caller merely be slow, there is
        one more call in the queue than allowed.
        """
        missing = {call for call in self.gate.inside() if call.request.id not in self.living}
        for call in missing & self._missing:
            self.gate.leave(call)
        self._missing = missing

    # --- from the engine ---

    def _on_delta(self, call: Call, delta: Delta) -> None:
        """The sink of one call."""
        if call.ended:
            return
        if call.first_token is None and (delta.token_ids or delta.text):
            call.first_token = time.monotonic()
        call.tokens += len(delta.token_ids)
        if call.outcome is None:
            call.deltas.append(delta)
        if delta.error is not None:
            self._finish(call, delta.error)
        elif delta.finish_reason is not None:
            self._finish(call, self._summary(call, delta.finish_reason, delta.usage))
        elif call.streaming:
            call.signal()

    def _summary(self, call: Call, reason: FinishReason, usage: Usage | None) -> Finish:
        created, now = call.request.created, time.monotonic()
        timings = Timings(
            queued=(call.began or now) - created,
            first_token=None if call.first_token is None else call.first_token - created,
            total=now - created,
        )
        return Finish(reason, usage or Usage(completion_tokens=call.tokens), timings)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        """The server's final word on a call it knew."""
        del self.living[call.request.id]
        if call.engine is None:
            self._turns.remove(call)
            self.gate.leave(call)
        else:
            self._load[call.engine] -= 1
            if not self._load[call.engine]:
                del self._load[call.engine]
        if not self.living:
            self._emptied.set()
        self._say(call, outcome)
        self._pump_soon()

    def _say(self, call: Call, outcome: Outcome) -> None:
        self.gate.leave(call)
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = call.request.id
        call.ended = True
        call.settle(outcome)
        call.signal()
        logger.debug("end %s: %s", call.request.id, type(outcome).__name__)


def timeout_error(call: Call) -> RequestTimeoutError:
    """What a call whose deadline has passed ends with."""
    where = "the engine" if call.began is not None else "the queue"
    waited = time.monotonic() - call.request.created
    return RequestTimeoutError(
        f"Request {call.request.id} passed its deadline after {waited:.1f} s in {where}; generation was aborted. "
        "Give a longer timeout, or fewer max_new_tokens."
    )


def closed_error(cause: BaseException) -> LMBridgeError:
    """What a call ends with when the loop is gone: a waiter's own instance, with the cause chained."""
    if isinstance(cause, BridgeClosedError):
        return fresh(cause)
    error = BridgeClosedError(f"The server thread has ended ({cause!r}); the request was lost. Build a new Bridge.")
    error.__cause__ = cause
    return error
