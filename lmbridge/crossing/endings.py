"""How a call can end other than with its answer: the errors, and the line in the log.

Rule: pure functions; each error says what happened, what it means for the request and what to do.
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
    """What a call whose deadline has passed ends with.

    Args:
        status: of the engine.
        waiting: how many requests have a place in the queue.
    """
    waited = time.monotonic() - call.request.created
    end = "generation" if call.request.job is None else "it"
    if call.began is None:
        where, advice = _what_held_it(call, status, waiting)
    elif call.request.job is not None:
        where, advice = "in the engine", "Its batch had not ended: give a longer timeout, or smaller batches."
    elif call.first_token is None:
        where, advice = "in the engine", "No token had come: see in health() whether the engine makes progress."
    else:
        where, advice = "in the engine", "Give a longer timeout, or fewer max_new_tokens."
    what = f"Request {call.request.id} passed its deadline after {waited:.1f} s {where}; {end} was aborted."
    return RequestTimeoutError(f"{what} {advice}")


def _what_held_it(call: Call, status: Status, waiting: int) -> tuple[str, str]:
    """Where a call that never reached the engine was held up, and what to do."""
    reason = f" ({status.reason})" if status.reason else ""
    if status.state in ("new", "starting", "unloaded"):
        return f"while the model was loading{reason}", "Give a longer timeout, or load first: bridge.start()."
    if status.state == "restarting":
        return f"while the engine was restarting{reason}", "Send it again when health() says that it is ready."
    if status.state != "ready":
        return f"while the bridge was {status.state}{reason}", "Build a new Bridge."
    if reason:
        return f"in the queue{reason}", "Send it again when health() shows that this is over."
    if not call.admitted:
        return (
            f"waiting for a place in the queue, which {waiting} requests fill",
            "Give a longer timeout, or send fewer requests at once.",
        )
    return "in the queue", "Give a longer timeout; health() says what holds the queue up."


def closed_error(cause: BaseException) -> LMBridgeError:
    """What a call ends with when the loop is gone: a waiter's own instance, with the cause chained."""
    if isinstance(cause, BridgeClosedError):
        return fresh(cause)
    error = BridgeClosedError(
        f"The server thread has ended ({shown(cause)}); the request was lost. Build a new Bridge."
    )
    error.__cause__ = cause
    return error


def lost_error(cause: BaseException) -> EngineDeadError:
    """What a call ends with whose engine died under it."""
    error = EngineDeadError(f"The engine died while it worked on this request: {shown(cause)}. Send it again.")
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


def twice_error(request_id: str) -> InvalidRequestError:
    """What a call ends with whose id another living one has."""
    return InvalidRequestError(
        f"A request with the id {request_id!r} is running already; give each its own.", "request_id"
    )


def interrupted_error() -> RequestAbortedError:
    """What a call counts as having ended with when an exception struck the thread that waited for it."""
    return RequestAbortedError("The waiting thread was interrupted.")


def log_end(call: Call) -> None:
    """One line a request, never with its text."""
    outcome, request = call.outcome, call.request
    end = outcome.finish_reason if isinstance(outcome, Response) else type(outcome).__name__
    age = time.monotonic() - request.created
    logger.debug("request %s of client %s: %s, %d tokens in %.3f s", request.id, request.client, end, call.tokens, age)
