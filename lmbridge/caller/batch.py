"""A list of prompts as one call of the caller: in together as room allows, out in order.

Rule: caller's thread only. A batch is one consumer with one channel; its tokens say which of its calls has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmbridge.crossing.call import Call, timeout_error
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Request, Response
from lmbridge.server.server import Server

if TYPE_CHECKING:
    from lmbridge.crossing.gate import Gate

Result = Response | BaseException


class Batch:
    """Runs ``requests`` to their ends.

    A request that is an exception already (its prompt was refused) is that slot's outcome.
    """

    def __init__(self, server: Server, channel: Channel, client: object, keep_errors: bool, progress: bool) -> None:
        self._server = server
        self._gate: Gate = server.gate
        self._channel = channel
        self._client = client
        self._keep_errors = keep_errors
        self._progress = progress
        self._waiting: deque[tuple[int, Request]] = deque()
        self._open: dict[Call, int] = {}
        self._results: dict[int, Result] = {}

    def run(self, requests: list[Request | LMBridgeError]) -> list[Result]:
        """One result for each request, in order.

        Raises:
            LMBridgeError: the first error, with its position as ``index``; the rest have been aborted. Not raised
                when errors are kept: they fill their slots.
        """
        with _bar(len(requests), self._progress) as advance:
            for index, request in enumerate(requests):
                if isinstance(request, LMBridgeError):
                    self._record(index, request)
                    advance()
                else:
                    self._waiting.append((index, request))
            try:
                while self._waiting or self._open:
                    self._send_what_fits()
                    call = self._next_ended()
                    if call is not None:
                        self._record_call(call)
                        advance()
            except BaseException:
                self._abort_rest()
                raise
        return [self._results[index] for index in range(len(requests))]

    def _send_what_fits(self) -> None:
        """Send while there is room; wait for room only when there is no answer to wait for."""
        while self._waiting:
            index, request = self._waiting[0]
            call = Call(request, self._channel, self._client)
            others = bool(self._open)
            self._open[call] = index  # first, so that it will be aborted whatever happens next
            if not self._gate.try_enter(call):
                if others:
                    del self._open[call]
                    return
                if not self._gate.enter(call):
                    call.settle(timeout_error(call))
            self._waiting.popleft()
            if call.outcome is None:
                self._server.submit(call)

    def _next_ended(self) -> Call | None:
        """Block for the next call that ends, or settle those whose deadline has passed and return one of them."""
        now = time.monotonic()
        deadline = next(iter(self._open)).request.deadline  # a list shares one
        if deadline is not None and now >= deadline:
            call = next(iter(self._open))
            if call.settle(timeout_error(call)):
                self._server.abort(call)
            return call
        try:
            token = self._channel.wait(True, None if deadline is None else deadline - now)
        except Empty:
            return None
        except Closed:
            token = next(iter(self._open))
            token.settle(self._server.closed_error())
        return token if token in self._open and token.outcome is not None else None

    def _record_call(self, call: Call) -> None:
        index = self._open.pop(call)
        try:
            self._results[index] = call.response()
        except LMBridgeError as error:
            self._record(index, error)

    def _record(self, index: int, error: LMBridgeError) -> None:
        error.index = index
        if not self._keep_errors:
            raise error
        self._results[index] = error

    def _abort_rest(self) -> None:
        for call in self._open:
            if call.settle(call.finish("abort")):
                self._server.abort(call)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar's ``update``, or something that does nothing."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="prompts", unit="prompt") as bar:
        yield bar.update
