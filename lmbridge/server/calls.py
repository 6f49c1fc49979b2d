"""A call's life on the server thread: it arrives, waits its turn, begins, is answered, and ends.

Rule: server thread only. A call goes ``arrive`` → ``_begin`` → ``_on_delta`` … → ``_finish``, and ends exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE
from lmbridge.crossing.endings import log_end, lost_error, twice_error
from lmbridge.crossing.handle import ServerHandle
from lmbridge.engines.base import engine_error
from lmbridge.errors import EngineDeadError, EngineError, LMBridgeError, fresh
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, Outcome
from lmbridge.metrics import Metrics
from lmbridge.server.border import as_own, check_task, flaw, name_of
from lmbridge.server.place import Place
from lmbridge.server.turns import Turns

LEFT = TimeoutError("the server thread was stuck and has been replaced")


def _nothing() -> None:
    """No callback."""


class Calls:
    """The unfinished calls, and the engine they go to.

    Attributes:
        living: unfinished calls by request id; other threads may copy it to look.
        turns: the queue of waiting calls.
        place: the engine that gets new calls; None while there is none.
        on_idle: called when the last call has ended.
        on_arrival: called when a call arrives while there is no engine and one is to be loaded for it; None otherwise.
    """

    def __init__(self, handle: ServerHandle, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        self.left_behind = False  # set from outside once this thread is stuck: stay silent if it wakes up
        self.living: dict[str, Call] = {}
        self.place: Place | None = None
        self.on_idle: Callable[[], None] = _nothing
        self.on_arrival: Callable[[], None] | None = None
        self._handle = handle
        self._sent = handle.sent
        self._gate = handle.gate
        self._loop = loop
        self._metrics = metrics
        self._running: dict[Call, Place] = {}  # the unfinished calls in an engine; the others wait for their turn
        self.turns = Turns()
        self._refusal: LMBridgeError | None = None  # ends every call while there is no engine and will be none
        self._pump_due = False
        self._quiet: asyncio.Event | None = None  # set while a task waits for the last call's end

    # --- a call's life ---

    def arrive(self, call: Call) -> None:
        """Take in a sent call: it runs at once if there is room for all, or waits its turn."""
        if self.living.get(call.request.id) is call:  # found twice
            return
        if self.left_behind:  # this thread was slow, not stuck
            self._handle.submit(call)
        elif call.outcomes:  # its caller has left meanwhile
            self._say(call, call.outcomes[0])
        elif call.request.id in self.living:
            self._say(call, twice_error(call.request.id))
        elif self._refusal is not None:
            self._say(call, fresh(self._refusal))
        else:
            self.living[call.request.id] = call
            place = self.place
            if place is not None and not self.turns.lanes and place.room > len(self._sent):
                self._begin(call, place)
            else:
                self.turns.push(call)
                if self.on_arrival is not None:
                    self.on_arrival()
                if self.left_behind:  # only now: the successor may have missed it
                    self._handle.submit(call)

    def pump(self) -> None:
        """Start waiting calls while the engine has room."""
        self._pump_due = False
        while self.turns.lanes and (place := self.place) is not None and place.room > 0 and not self.left_behind:
            self._begin(self.turns.pop(), place)

    def _begin(self, call: Call, place: Place) -> None:
        self._gate.leave(call)
        self._running[call] = place
        place.calls[call] = None
        call.heard = place.progress
        call.began = time.monotonic()
        request, engine = call.request, place.engine
        try:
            check_task(engine, request)
            engine.check(request)
            # In a copy: the caller's observer may be running in the context itself.
            request.context.copy().run(engine.add_request, request, functools.partial(self._on_delta, place, call))
        except EngineDeadError as death:
            self._unbegin(call, place)
            place.die(death.__cause__ or death)
        except LMBridgeError as error:
            self._fail(call, as_own(error, call))
        except BaseException as cause:  # SystemExit too: no engine may end the loop
            self._fail(call, engine_error(f"{name_of(engine)} could not begin the request: {shown(cause)}.", cause))
        if self.left_behind and call.settle(lost_error(LEFT)):  # the successor may not have seen it begin
            self._handle.abort(call)

    def _unbegin(self, call: Call, place: Place) -> None:
        """The engine was already dead: the call waits for the next one."""
        if self._running.get(call) is not place or call.deltas or call.read:  # it had begun, so it ends with the engine
            return
        del self._running[call]
        place.leave(call)
        call.began = None
        self.turns.push(call)

    def _on_delta(self, place: Place, call: Call, delta: Delta) -> None:
        """Receives the deltas of one call from one engine."""
        if self._running.get(call) is not place or self.left_behind:  # it has already ended
            return
        call.heard = place.progress = place.progress + 1
        # The usual case, inlined: calling flaw() for each delta would cost a twentieth of the throughput.
        usual = type(delta) is Delta and type(delta.text) is str and type(delta.token_ids) is list
        usual = usual and delta.logprobs is None and delta.finish_reason is None and delta.error is None
        usual = usual and delta.reasoning == "" and delta.tool_calls == ()
        if not usual and (wrong := flaw(delta)) is not None:
            self._disbelieve(place, call, wrong)
            return
        tokens = len(delta.token_ids)
        if call.first_token is None and (tokens or delta.text):
            call.first_token = time.monotonic()
        call.tokens += tokens
        if not call.outcomes:
            call.deltas.append(delta)
            if len(call.deltas) >= call.limit:
                call.merge()
        if delta.error is not None:
            self._finish(call, as_own(delta.error, call))
        elif delta.finish_reason is not None:
            self._finish(call, call.finish(delta.finish_reason, delta.usage))
        elif call.streaming and not call.signalled:
            call.channel.signal(call)

    def _disbelieve(self, place: Place, call: Call, wrong: str) -> None:
        """End a call for which the engine sent an invalid delta."""
        call.settle(EngineError(f"The engine {name_of(place.engine)} sent {wrong}; fix the engine."))
        self.abort(call)
        self.let_go(call)

    def abort(self, call: Call) -> None:
        """Stop a settled call: at once if it is waiting, through the engine if it is running."""
        if call.ended and call not in self._gate.calls:
            return
        call.channel.signal(call)  # the settling thread may not be its reader
        if self.living.get(call.request.id) is not call:  # it was never sent
            self._say(call, call.outcomes[0])
            return
        place = self._running.get(call)
        if place is None:
            self._finish(call, call.outcomes[0])
            return
        try:
            call.request.context.copy().run(place.engine.abort_request, call.request.id)
        except BaseException as cause:
            place.die(cause)  # an engine that cannot abort cannot be trusted with its batch

    def let_go(self, call: Call) -> None:
        """End a settled call whose engine does not confirm the abort."""
        if self.living.get(call.request.id) is call:
            self._finish(call, call.outcomes[0])

    def _fail(self, call: Call, error: LMBridgeError) -> None:
        if self.living.get(call.request.id) is call:  # the engine may have ended it before raising
            self._finish(call, error)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        """End an unfinished call."""
        del self.living[call.request.id]
        place = self._running.pop(call, None)
        if place is None:
            self.turns.remove(call)
        else:
            place.leave(call)
        self._say(call, outcome)
        if self.turns.lanes and not self._pump_due:  # once after each engine step, not once per ended call
            self._pump_due = True
            self._loop.call_soon(self.pump)

    def _say(self, call: Call, outcome: Outcome) -> None:
        """End a call for good: unregister it, count it, and notify its reader."""
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = call.request.id
        call.settle(outcome)
        call.ended = True
        if call.began is None:
            self._gate.forget(call)
        book = self._gate.calls
        if book.pop(call, self) is None:  # in one step: a stuck thread may wake up
            with contextlib.suppress(Exception):  # the reader is notified even if counting fails
                self._metrics.ended(call.outcomes[0])
            if logger.isEnabledFor(logging.DEBUG):
                log_end(call)
            if not book:
                self.on_idle()
                if self._quiet is not None:
                    self._quiet.set()
        call.channel.signal(call)

    # --- all calls at once ---

    def install(self, place: Place) -> None:
        """Give waiting and new calls to this engine from now on."""
        self.place = place
        self._refusal = None
        self.pump()

    def vacate(self, place: Place) -> None:
        """Give this engine nothing more; its calls go on, waiting calls keep waiting."""
        if self.place is place:
            self.place = None

    def fail_begun(self, place: Place, cause: BaseException) -> None:
        """End the calls in the dead engine; waiting calls keep waiting."""
        self.vacate(place)
        for call in list(place.calls):
            self._finish(call, lost_error(cause))

    def refuse(self, error: LMBridgeError) -> None:
        """End waiting calls and every later one with a copy of ``error``."""
        self._refusal = error
        for call in [call for call in self.living.values() if call not in self._running]:
            self._finish(call, fresh(error))

    def end_all(self, error: LMBridgeError) -> None:
        """Abort running calls, and end every call, later ones included, with a copy of ``error``."""
        self.place, self._refusal = None, error
        for call in list(self._gate.calls):
            call.settle(fresh(error))
            self.abort(call)
            self.let_go(call)

    async def drained(self) -> None:
        """Return once every call has ended."""
        while self._gate.calls:
            self._quiet = asyncio.Event()
            with contextlib.suppress(TimeoutError):  # the gate unregisters refused calls silently
                await asyncio.wait_for(self._quiet.wait(), SLICE)

    # --- when the thread ends or is replaced ---

    def close(self, cause: BaseException) -> None:
        """End every call and refuse new ones, with ``cause`` chained. The loop need not run."""
        self.place = self._quiet = None  # this may not be the loop's thread, so it must not touch an Event
        self.living.clear()
        self._running.clear()
        for call in self._handle.close(cause):
            self._say(call, call.outcomes[0])

    def take_over(self, stuck: Calls, loss: BaseException) -> None:
        """Take over from a stuck thread: its running calls are lost, its waiting calls wait here."""
        for call in list(stuck.living.values()):
            if call not in stuck._running:
                self.arrive(call)
            else:
                call.settle(lost_error(loss))
                self._say(call, call.outcomes[0])
                call.channel.nudge(call)
