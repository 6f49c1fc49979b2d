"""The exchange of a served model, asked for over HTTP, and news of how it goes.

Rule: knows no request. The bridge does the work, on a thread of its own, so that a client that leaves stops nothing.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from werkzeug.exceptions import Conflict

from lmbridge.bridge import Bridge
from lmbridge.errors import EngineError, InvalidRequestError, UnknownEngineError
from lmbridge.flask.errors import http_error

NEWS = 0.5  # seconds between two lines while it goes on

_busy: set[Bridge] = set()  # being exchanged now; added under the lock, discarded in one atomic step
_lock = threading.Lock()


@dataclass(frozen=True)
class Order:
    """What is to be exchanged.

    Attributes:
        model: the name it is served under, which stays.
        to: the new model: a folder, a hub id, or ``demo``.
        engine, options: what runs it, and how.
        overlap: load it beside the old one, which needs memory for both.
        timeout: without overlap, seconds for what runs to finish.
    """

    model: str
    to: str
    engine: str = "transformers"
    options: dict[str, Any] = field(default_factory=dict)
    overlap: bool = True
    timeout: float | None = None


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "model": ((str,), "a text"),
    "to": ((str,), "a text"),
    "engine": ((str,), "a text"),
    "options": ((dict,), "an object"),
    "overlap": ((bool,), "true or false"),
    "timeout": ((int, float, type(None)), "seconds or null"),
}


def parse_order(body: Any, default: str) -> Order:
    """The order in a request's JSON; without ``model`` it is for the model named ``default``.

    Raises:
        InvalidRequestError: it is none; ``param`` names the field at fault.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError('The body must be a JSON object such as {"to": "another-model"}.')
    for name, value in body.items():
        if name not in _KINDS:
            raise InvalidRequestError(f"There is no field {name!r}; the fields are {', '.join(_KINDS)}.", name)
        kinds, wanted = _KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidRequestError(f"{name} must be {wanted}.", name)
    for name in body.get("options", {}):
        if name in _KINDS:
            raise InvalidRequestError(f"{name} is no option of an engine; it stands beside options.", name)
    if not body.get("to"):
        raise InvalidRequestError("to is missing: the model to load.", "to")
    return Order(**{"model": default, **body})


def exchange(bridge: Bridge, order: Order) -> Iterator[str]:
    """Begin, and return the news: one JSON object a line with ``outcome`` pending, done or failed.

    Raises:
        Conflict: this model is being exchanged already.
        LMBridgeError: it failed at once, as what names no model or engine does.
    """
    with _lock:
        if bridge in _busy:
            raise Conflict(f"The model {order.model!r} is being exchanged already.")
        _busy.add(bridge)
    began = time.monotonic()
    swap: Future[None] = Future()
    try:
        threading.Thread(target=_swap, args=(bridge, order, swap), name="lmbridge swap", daemon=True).start()
    except BaseException:
        _busy.discard(bridge)
        raise
    error = _wait(swap)
    if error is not None:
        raise error
    return _news(bridge, order, swap, began)


def _swap(bridge: Bridge, order: Order, swap: Future[None]) -> None:
    error: BaseException | None = EngineError("The exchange was interrupted; the server's log says how.")
    try:
        error = _try_to_swap(bridge, order)
    finally:
        _busy.discard(bridge)
        if error is None:
            swap.set_result(None)
        else:
            swap.set_exception(error)


def _try_to_swap(bridge: Bridge, order: Order) -> BaseException | None:
    """The error it ended with."""
    try:
        bridge.swap(order.to, order.engine, overlap=order.overlap, timeout=order.timeout, **order.options)
    except UnknownEngineError as unknown:
        return InvalidRequestError(str(unknown), "engine")
    except BaseException as cause:
        return cause
    return None


def _wait(swap: Future[None]) -> BaseException | None:
    """Wait for the end, but not for long; the error it ended with."""
    try:
        return swap.exception(NEWS)
    except concurrent.futures.TimeoutError:
        return None


def _news(bridge: Bridge, order: Order, swap: Future[None], began: float) -> Iterator[str]:
    def line(outcome: str, **more: Any) -> str:
        seconds = round(time.monotonic() - began, 2)
        facts = {"outcome": outcome, "model": order.model, "to": order.to, "state": bridge.state, "seconds": seconds}
        return json.dumps({**facts, **more}) + "\n"

    while not swap.done():
        yield line("pending")
        _wait(swap)
    error = swap.exception()
    if error is None:
        yield line("done")
    else:
        told = http_error(error)
        yield line("failed", error={"message": told.message, "type": type(error).__name__, "status": told.status})
