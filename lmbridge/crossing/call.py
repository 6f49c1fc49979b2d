"""One request on its way: what the caller's end and the loop end share, and how it can end.

Rule: no queue and no thread is known here. What is written by one end only says by which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineError,
    LMBridgeError,
    RequestTimeoutError,
    fresh,
)
from lmbridge.messages import Delta, FinishReason, Outcome, Request, Response, Timings, Usage, join_deltas

if TYPE_CHECKING:
    from lmbridge.crossing.channel import Channel
    from lmbridge.server.place import Place

logger = logging.getLogger("lmbridge")


class Call:
    """One request on its way: what the caller's end and the loop end share.

    ``deltas`` is appended by the server thread and emptied by the caller, each in one atomic step.
    """

    __slots__ = (
        "request", "channel", "client", "streaming", "deltas", "signalled",
        "place", "heard", "began", "first_token", "tokens", "ended", "outcomes", "__weakref__",
    )  # fmt: skip

    def __init__(self, request: Request, channel: Channel, client: object, streaming: bool = False) -> None:
        self.request = request
        self.channel = channel
        self.client = client  # closing it ends its calls
        self.streaming = streaming  # a token per engine step, not only at the end
        self.deltas: list[Delta] = []
        self.signalled = False  # a token is on its way; the reader clears it before it looks
        self.place: Place | None = None  # where it runs; server thread only, as are the next five
        self.heard = 0  # the place's count of deltas at this call's latest
        self.began: float | None = None
        self.first_token: float | None = None
        self.tokens = 0
        self.ended = False  # the server's final word has been said; read by anyone
        self.outcomes: list[Outcome] = []  # the ends that were proposed; the first one counts

    def settle(self, outcome: Outcome) -> bool:
        """Try to be the one outcome; False when another was first. Any thread, any moment, no lock.

        ``list.append`` is one atomic step that decides and records, so nothing can come between the two.
        """
        self.outcomes.append(outcome)
        return self.outcomes[0] is outcome

    @property
    def outcome(self) -> Outcome | None:
        return self.outcomes[0] if self.outcomes else None

    def response(self, read: Sequence[Delta] = ()) -> Response:
        """The whole answer of a call that has an outcome, after what was ``read`` already.

        Raises:
            BaseException: the call's error, with the text generated before it as ``partial``.
        """
        outcome = self.outcomes[0]
        if not isinstance(outcome, Response):
            raise self.error(outcome, read)
        deltas = [*read, *self.deltas] if read else self.deltas
        if deltas:
            whole = deltas[0] if len(deltas) == 1 else join_deltas(deltas)
            outcome.text, outcome.token_ids, outcome.logprobs = whole.text, whole.token_ids, whole.logprobs
        return outcome

    def error(self, outcome: BaseException, read: Sequence[Delta] = ()) -> BaseException:
        """The call's error, completed with what its waiter knows."""
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = self.request.id
            outcome.partial = "".join(delta.text for delta in [*read, *self.deltas])
        return outcome

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> Response:
        """The outcome of a call that ends now without an error; tokens are counted where the engine does not."""
        created, now = self.request.created, time.monotonic()
        first_token = None if self.first_token is None else self.first_token - created
        timings = Timings((self.began or now) - created, first_token, now - created)
        usage = usage or Usage(completion_tokens=self.tokens)
        return Response("", [], reason, usage, timings, None, self.request.id)


def timeout_error(call: Call) -> RequestTimeoutError:
    """What a call whose deadline has passed ends with."""
    if call.began is None:
        where, advice = "the queue", "Give a longer timeout; health() says what holds the queue up."
    elif call.first_token is None:
        where, advice = "the engine", "No token had come: see in health() whether the engine makes progress."
    else:
        where, advice = "the engine", "Give a longer timeout, or fewer max_new_tokens."
    waited = time.monotonic() - call.request.created
    what = f"Request {call.request.id} passed its deadline after {waited:.1f} s in {where}; generation was aborted."
    return RequestTimeoutError(f"{what} {advice}")


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


def forgotten_error(silent: float) -> EngineError:
    """What a call ends with that its engine has left lying for ``silent`` seconds while it worked on others."""
    error = EngineError(
        f"The engine made no progress on this request for {silent:g} s while it went on with others; the request was "
        "aborted. Send it again."
    )
    error.retryable = True
    return error


def log_end(call: Call) -> None:
    """One line a request, never with its text."""
    outcome, request = call.outcome, call.request
    end = outcome.finish_reason if isinstance(outcome, Response) else type(outcome).__name__
    age = time.monotonic() - request.created
    logger.debug("request %s of client %s: %s, %d tokens in %.3f s", request.id, request.client, end, call.tokens, age)
