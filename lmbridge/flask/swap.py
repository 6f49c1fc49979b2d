"""Swaps a served model on an order over HTTP, and reports progress.

Rule: knows no HTTP request. The bridge works on its own thread, so a client that disconnects stops nothing.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from werkzeug.exceptions import Conflict, Forbidden

from lmbridge.bridge import Bridge
from lmbridge.errors import EngineError, InvalidRequestError, UnknownEngineError
from lmbridge.flask.errors import http_error
from lmbridge.flask.openai.fields import BOOL, OBJECT, TEXT, Fields, Kind, number
from lmbridge.log import shown

NEWS = 0.5  # seconds between progress lines
LONGEST = 86_400  # seconds that an order may wait for running requests

_busy: set[Bridge] = set()  # swaps in progress; added under the lock, discarded in one atomic step
_lock = threading.Lock()


@dataclass(frozen=True)
class Order:
    """An order to swap a model.

    Attributes:
        model: the served name, which stays.
        to: the new model: a folder, a hub id, or ``demo``.
        engine: the new model's engine; None: that of the old one.
        options: the engine's options.
        overlap: load the new model beside the old one, which needs memory for both.
        timeout: without overlap, seconds for running requests to finish.
    """

    model: str
    to: str
    engine: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    overlap: bool = True
    timeout: float | None = None


_KINDS: dict[str, Kind] = {
    "model": TEXT,
    "to": TEXT,
    "engine": TEXT,
    "options": OBJECT,
    "overlap": BOOL,
    "timeout": number(0, LONGEST),
}
_NO_OPTIONS = {*_KINDS, *inspect.signature(Bridge.swap).parameters} - {"device"}  # Bridge.swap's own, such as "self"
_OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # any other may be code from the hub


def parse_order(body: dict[str, Any], default: str, allow_remote_code: bool) -> Order:
    """Read an order from a request's JSON; without ``model``, it is for the model named ``default``.

    Raises:
        InvalidRequestError: the order is invalid; ``param`` names the field.
        Forbidden: an option runs code that comes with a model, which this server does not allow.
    """
    for name in body:
        if name not in _KINDS:
            raise InvalidRequestError(f"Unknown field {name!r}; the fields are {', '.join(_KINDS)}.", name)
    fields = Fields(body)
    given = {name: value for name, kind in _KINDS.items() if (value := fields.take(name, kind)) is not None}
    if not given.get("to"):
        raise InvalidRequestError("The field 'to' is missing; name the model to load.", "to")
    for name, value in given.get("options", {}).items():
        if name in _NO_OPTIONS:
            raise InvalidRequestError(
                f"{name} is not an engine option; the fields of an order are {', '.join(_KINDS)}.", name
            )
        if _runs_code(name, value) and not allow_remote_code:
            raise Forbidden(
                f"The option {name}={shown(value)} runs code that comes with the model, which this server does not "
                "allow. Its operator can start it with --allow-remote-code; an app has LMBRIDGE_ALLOW_REMOTE_CODE."
            )
    return Order(**{"model": default, **given})


def _runs_code(option: str, value: Any) -> bool:
    return bool(option == "trust_remote_code" and value) or (
        option == "attn_implementation" and value not in _OWN_ATTENTION
    )


def exchange(bridge: Bridge, order: Order) -> Iterator[str]:
    """Begin the swap; return progress lines, JSON objects with ``outcome`` pending, done or failed.

    Raises:
        Conflict: this model is already being swapped.
        LMBridgeError: the swap failed at once, for example because the model does not exist.
    """
    with _lock:
        if bridge in _busy:
            raise Conflict(f"The model {order.model!r} is already being swapped; try again later.")
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
    error: BaseException | None = EngineError("The swap was interrupted; see the server's log.")
    try:
        error = _try_to_swap(bridge, order)
    finally:
        _busy.discard(bridge)
        if error is None:
            swap.set_result(None)
        else:
            swap.set_exception(error)


def _try_to_swap(bridge: Bridge, order: Order) -> BaseException | None:
    """Swap; return the error, or None."""
    try:
        bridge.swap(order.to, order.engine, overlap=order.overlap, timeout=order.timeout, **order.options)
    except UnknownEngineError as unknown:
        return InvalidRequestError(str(unknown), "engine")
    except BaseException as cause:
        return cause
    return None


def _wait(swap: Future[None]) -> BaseException | None:
    """Wait briefly for the end; return the error, or None."""
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
