"""One request on its way: what the caller's end and the loop end share, and how it can end.

Rule: no queue and no thread is known here. What is written by one end only says by which.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmbridge.errors import BridgeClosedError, EngineDeadError, LMBridgeError, RequestTimeoutError, fresh
from lmbridge.messages import Delta, FinishReason, Request, Timings, Usage

if TYPE_CHECKING:
    from lmbridge.channel import Channel
    from lmbridge.seat import Seat

logger = logging.getLogger("lmbridge")


@dataclass(slots=True)
class Finish:
    """How a call ended well."""

    reason: FinishReason
    usage: Usage
    timings: Timings


Outcome = Finish | BaseException


class Call:
    """One request on its way: what the caller's end and the loop end share.

    ``deltas`` is appended by the server thread and popped by the caller; both ends of a deque are atomic.
    """

    __slots__ = (
        "request", "channel", "client", "streaming", "deltas", "signalled",
        "seat", "began", "first_token", "tokens", "ended", "_settled", "__weakref__",
    )  # fmt: skip

    def __init__(self, request: Request, channel: Channel, client: object, streaming: bool = False) -> None:
        self.request = request
        self.channel = channel
        self.client = client  # closing it ends its calls
        self.streaming = streaming  # a token per engine step, not only at the end
        self.deltas: deque[Delta] = deque()
        self.signalled = False  # a token is on its way; the reader clears it before it looks
        self.seat: Seat | None = None  # where it runs; server thread only, as are the next four
        self.began: float | None = None
        self.first_token: float | None = None
        self.tokens = 0
        self.ended = False  # the server's final word has been said; read by anyone
        self._settled: dict[str, Outcome] = {}

    def settle(self, outcome: Outcome) -> bool:
        """Try to be the one outcome; False when another was first. Any thread, any moment, no lock.

        ``dict.setdefault`` is one atomic step, so an exception between decision and record cannot happen.
        """
        return self._settled.setdefault("outcome", outcome) is outcome

    @property
    def outcome(self) -> Outcome | None:
        return self._settled.get("outcome")

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> Finish:
        """The outcome of a call that ends now without an error; tokens are counted where the engine does not."""
        created, now = self.request.created, time.monotonic()
        timings = Timings(
            queued=(self.began or now) - created,
            first_token=None if self.first_token is None else self.first_token - created,
            total=now - created,
        )
        return Finish(reason, usage or Usage(completion_tokens=self.tokens), timings)

    def signal(self) -> None:
        """Tell the reader that there is something to look at. Server thread only."""
        if not self.signalled:
            self.signalled = True
            self.channel.signal(self)


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


def lost_error(cause: BaseException) -> EngineDeadError:
    """What a call ends with whose engine died under it."""
    error = EngineDeadError(f"The engine died while it worked on this request: {cause!r}. Send it again.")
    error.retryable = True
    error.__cause__ = cause
    return error


def log_end(call: Call) -> None:
    """One line a request at DEBUG, never with its text."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    outcome, request = call.outcome, call.request
    end = outcome.reason if isinstance(outcome, Finish) else type(outcome).__name__
    age = time.monotonic() - request.created
    logger.debug("request %s of client %s: %s, %d tokens in %.3f s", request.id, request.client, end, call.tokens, age)
