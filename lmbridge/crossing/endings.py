"""How a call can end without an answer: the errors, and the log line.

Rule: pure functions; each error says what happened and what to do.
"""

from __future__ import annotations

import time

from lmbridge.crossing.call import Call
from lmbridge.crossing.status import Status
from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    LMBridgeError,
    RequestAbortedError,
    RequestTimeoutError,
    fresh,
)
from lmbridge.log import logger, shown
from lmbridge.messages import Response


def timeout_error(call: Call, status: Status, waiting: int) -> RequestTimeoutError:
    """The error of a call whose deadline has passed.

    Args:
        status: the engine's status.
        waiting: how many requests are in the queue.
    """
    waited = time.monotonic() - call.request.created
    end = "generation" if call.request.job is None else "it"
    hint = ""
    if call.began is None:
        where, advice, hint = _what_held_it(call, status, waiting)
    elif call.request.job is not None:
        where, advice = "in the engine", "Its batch had not finished: give a longer timeout, or use smaller batches."
    elif call.first_token is None:
        where, advice, hint = "in the engine", "No token had arrived.", "health() says whether it makes progress."
    else:
        where, advice = "in the engine", "Give a longer timeout, or lower max_new_tokens."
    what = f"Request {call.request.id} passed its deadline after {waited:.1f} s {where}; {end} was aborted."
    return RequestTimeoutError(f"{what} {advice}").hinted(hint)


def _what_held_it(call: Call, status: Status, waiting: int) -> tuple[str, str, str]:
    """Where a call that never reached the engine waited, what its caller can do, and what the program can."""
    longer, later = "Give a longer timeout.", "Send it again later."
    reason = f" ({status.reason})" if status.reason else ""
    if status.state in ("new", "starting", "unloaded"):
        return f"while the model was loading{reason}", longer, "bridge.start() loads it first."
    if status.state == "restarting":
        return f"while the engine was restarting{reason}", later, "health() says when the engine is ready."
    if status.state != "ready":
        return f"while the bridge was {status.state}{reason}", later, "Build a new Bridge."
    if reason:
        return f"in the queue{reason}", later, "health() says when this is over."
    if not call.admitted:
        where = f"while the queue was full (requests waiting: {waiting})"
        return where, "Give a longer timeout, or send fewer requests at once.", ""
    return "in the queue", longer, "health() says what delays the queue."


def closed_error(cause: BaseException) -> LMBridgeError:
    """The error of a call whose loop is gone: a new instance, with the cause chained."""
    if isinstance(cause, BridgeClosedError):
        return fresh(cause)
    error = BridgeClosedError(f"The server thread has ended ({shown(cause)}); the request was lost.")
    error.hint = "Build a new Bridge."
    error.__cause__ = cause
    return error


def lost_error(cause: BaseException) -> EngineDeadError:
    """The error of a call whose engine died."""
    error = EngineDeadError(f"The engine died while it worked on this request: {shown(cause)}. Send it again.")
    error.retryable = True
    error.__cause__ = cause
    return error


def forgotten_error(silent: float) -> EngineError:
    """The error of a call that its engine ignored for ``silent`` seconds while working on others."""
    error = EngineError(
        f"The engine made no progress on this request for {silent:g} s while it worked on others; the request was "
        "aborted. Send it again."
    )
    error.retryable = True
    return error


def twice_error(request_id: str) -> InvalidRequestError:
    """The error of a call whose id belongs to another unfinished one."""
    return InvalidRequestError(
        f"A request with the id {request_id!r} is already running; give each request its own id.", "request_id"
    )


def interrupted_error() -> RequestAbortedError:
    """The recorded outcome of a call whose waiting thread was interrupted."""
    return RequestAbortedError("The waiting thread was interrupted.")


def log_end(call: Call) -> None:
    """One log line per request, never with its text."""
    outcome, request = call.outcome, call.request
    end = outcome.finish_reason if isinstance(outcome, Response) else type(outcome).__name__
    age = time.monotonic() - request.created
    logger.debug("request %s of client %s: %s, %d tokens in %.3f s", request.id, request.client, end, call.tokens, age)
