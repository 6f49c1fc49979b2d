"""The Bridge: its verbs and its lifetime.

Rule: used from any thread but the server's. It assembles the parts and keeps one account per thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmbridge.caller.access import Access
from lmbridge.caller.account import Account
from lmbridge.caller.observer import Observer
from lmbridge.caller.requests import checked_flag, checked_seconds, checked_text
from lmbridge.caller.verbs import Verbs
from lmbridge.chat import Chat
from lmbridge.client import Client
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.status import State
from lmbridge.device import Device
from lmbridge.engines import engine_around, engine_class, engine_factory, named_engine
from lmbridge.engines.auto import AUTO, shown_url
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, RequestAbortedError
from lmbridge.messages import GenerationConfig, Task
from lmbridge.metrics import Metrics
from lmbridge.server.lodging import Terms
from lmbridge.server.swaps import Recipe
from lmbridge.server.thread import ServerThread
from lmbridge.values import as_int, as_number

_numbers = itertools.count(1)  # for clients without a name

Model = str | Path | Engine | Callable[[], Engine]


@dataclass(frozen=True)
class RequestInfo:
    """One unfinished request in ``bridge.requests()``: its ``age`` in seconds, and the ``tokens`` generated so far."""

    id: str
    state: Literal["waiting", "running"]
    client: str
    age: float
    tokens: int


@dataclass(frozen=True)
class Health:
    """A snapshot from ``bridge.health()``.

    Attributes:
        state: as in ``Bridge.state``. Requests are served while ``ready`` and kept while ``starting`` or
            ``restarting``; if ``unloaded``, the next request loads the model again.
        reason: why the bridge is ``restarting``, ``failed``, ``unloaded`` or ``starting`` again; what a load is waiting
            for; what delays the calls of a ``ready`` bridge (a swap, a full engine, or one that makes no progress and
            where it is stuck); where the thread of a ``closed`` bridge is stuck; otherwise "".
        waiting: requests waiting for the engine.
        running: requests in the engine.
        restarts: how often a dead engine has been replaced.
        silent: seconds since the server thread's last heartbeat (it sends two a second); 0 if there has been none.
    """

    state: State
    reason: str
    waiting: int
    running: int
    restarts: int
    silent: float


class Bridge(Verbs):
    """Lets any number of threads share one LLM engine.

    Nothing is loaded before the first call, ``start()`` or ``with``.

    Args:
        model: ``"demo"`` (the bundled model), a folder, a hub id, an Engine, or a function that builds one. After the
            engine dies, only a model given by name or as a function can be rebuilt.
        engine: the engine for a model given by name: ``transformers``, ``encoder``, ``exllamav2``, ``exllamav3``,
            ``function``, ``llamacpp``, ``lmdeploy``, ``openai``, ``ray``, ``vllm``, or one added by another package.
            ``"auto"`` chooses by what the model is.
        device: where the model runs: a torch device name, or a ``Device`` shared by several bridges; None lets the
            engine choose. Bridges on one device take turns, and load their models when there is room.
        keep_alive: unload the model after this many seconds without calls, until the next call; None keeps it until
            another model needs the memory. A model given as an Engine is never unloaded.
        pin: keep the model loaded even if another needs the memory.
        weight: the share of the device relative to other models: weight 2 gets twice the time of weight 1. It applies
            when three or more models compute, or one chooses the length of its turns, as encoders do. Two language
            models alternate.
        timeout: default deadline of every call, in seconds; None waits forever.
        max_pending: how many requests may wait for the engine.
        max_pending_per_client: how many of them may belong to one client.
        when_full: ``"block"`` makes callers wait for room until their deadline, ``"reject"`` raises QueueFullError.
        stall_timeout: an engine that has work but produces nothing for this many seconds counts as dead. A single
            request that stalls this long while others progress fails alone. None disables both checks.
        engine_options: options passed to the engine.

    Raises:
        ModelNotFoundError, UnknownEngineError, InvalidRequestError: the arguments cannot work.
    """

    def __init__(
        self,
        model: Model,
        engine: str = AUTO,
        *,
        device: str | Device | None = None,
        keep_alive: float | None = None,
        pin: bool = False,
        weight: float = 1.0,
        timeout: float | None = None,
        max_pending: int = 1024,
        max_pending_per_client: int = 256,
        when_full: Literal["block", "reject"] = "block",
        stall_timeout: float | None = 300.0,
        **engine_options: Any,
    ) -> None:
        _check_limits(max_pending, max_pending_per_client, when_full)
        _check_seconds(timeout=timeout, stall_timeout=stall_timeout, keep_alive=keep_alive)
        if stall_timeout == 0:
            raise InvalidRequestError("stall_timeout must be above 0, or None for no limit.", "stall_timeout")
        terms = Terms(keep_alive, checked_flag(pin, "pin"), _checked_weight(weight))
        recipe = _placed(model, engine, engine_options, device)
        metrics = Metrics()
        gate = Gate(max_pending, max_pending_per_client, when_full == "reject", metrics)
        self._device, self._engine = device, engine
        self._server_thread = ServerThread(recipe, gate, metrics, stall_timeout, terms)
        self._access = Access(self._server_thread.server, self._server_thread.handle, timeout)
        self._threads = threading.local()  # .account: one per thread, dropped when the thread ends

    # --- lifetime ---

    def start(self, timeout: float | None = None) -> Bridge:
        """Load the model now and block until it is ready, at most ``timeout`` seconds.

        Raises:
            EngineStartError: loading failed, and is not retried: build a new Bridge, or ``swap``.
            RequestTimeoutError: it was not ready in time; loading continues.
        """
        _check_seconds(timeout=timeout)
        self._server_thread.start(timeout)
        return self

    def close(self, *, drain: bool = False, timeout: float | None = 10.0) -> None:
        """Close the bridge: refuse new calls, finish (``drain``) or abort those already made, and free the model.

        Safe from any thread, any number of times; a second call may cut a drain short. Every call ends with an answer
        or BridgeClosedError, whatever the engine does: a stuck server thread is left behind.

        Args:
            drain: let every request finish, even while the model is loading, restarting or being swapped.
            timeout: the limit for that, in seconds; None for no limit. What remains is aborted. Closing the engine may
                take another 10 seconds.
        """
        self._server_thread.close(drain, checked_seconds(math.inf if timeout is None else timeout))
        self._access.close()

    def swap(
        self,
        model: Model,
        engine: str | None = None,
        *,
        overlap: bool = True,
        timeout: float | None = None,
        device: str | Device | None = None,
        **engine_options: Any,
    ) -> None:
        """Replace the model; blocks until the new one serves. No request fails. Ctrl-C cancels a swap not yet begun.

        Args:
            model, engine_options: as for Bridge.
            engine: as for Bridge; None: the bridge's present engine name.
            overlap: load the new model beside the old one, which needs memory for both; running requests finish on the
                old one. False holds new requests, lets the running ones finish, and frees the old model before loading
                the new one.
            timeout: with ``overlap=False``, how long to wait for running requests, in seconds.
            device: where the new model runs; None: the bridge's device.

        Raises:
            EngineStartError: the new model could not be loaded; the old one is kept (or loaded again).
            RequestTimeoutError: running requests did not finish in time, or the server thread is stuck and the swap did
                not begin; the old model is kept.
            InvalidRequestError: with ``overlap=False``, an old model given as an instance could not be rebuilt.
            BridgeClosedError: the bridge was closed meanwhile.
        """
        _check_seconds(timeout=timeout)
        engine = self._engine if engine is None else engine
        recipe = _placed(model, engine, engine_options, self._device if device is None else device)
        self._server_thread.swap(recipe, overlap, timeout)
        self._engine = engine

    def __enter__(self) -> Bridge:
        try:
            return self.start()
        except BaseException:  # Ctrl-C while loading, too: __exit__ will not run
            self.close(timeout=0.0)
            raise

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.close(drain=exc_type is None, timeout=60.0)

    def __del__(self) -> None:
        # A finalizer may run at any point of any code: no locks, no logging, no joining.
        server = getattr(self, "_server_thread", None)
        if server is not None and server.drop():
            message = f"unclosed {self!r}; use `with Bridge(...)` or close()"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    # --- callers ---

    def client(self, name: str | None = None, observer: Observer | None = None) -> Client:
        """A client with its own fairness account, its own pair of queues, and the same verbs.

        Args:
            name: the account; clients with the same name share one turn.
            observer: notified of the client's calls.
        """
        named = f"client-{next(_numbers)}" if name is None else checked_text(name, "name")
        if observer is not None and not (hasattr(observer, "begun") and hasattr(observer, "ended")):
            raise InvalidRequestError(f"observer must be an Observer, not {type(observer).__name__}.", "observer")
        return Client(self._access, named, self, observer)

    def chat(self, config: GenerationConfig | None = None, *, system: str | None = None) -> Chat:
        """A conversation that keeps its history; see ``lmbridge.chat.Chat``."""
        return Chat(self, config, system=system)

    def abort(self, request_id: str) -> None:
        """Abort the request with that id; its caller gets RequestAbortedError. Unknown ids are ignored."""
        if self._server_thread.started:
            error = RequestAbortedError(f"Request {request_id} was aborted by bridge.abort().")
            self._server_thread.handle.abort_where(lambda call: call.request.id == request_id, error)

    # --- inspection ---

    @property
    def state(self) -> State:
        """``new``, ``starting``, ``ready``, ``restarting``, ``unloaded``, ``draining``, ``failed`` or ``closed``."""
        return self._server_thread.status.state

    def health(self) -> Health:
        """The state, its reason and the load. Never blocks, so a stuck engine can be detected from outside."""
        living = self.requests()
        running = sum(request.state == "running" for request in living)
        status = self._server_thread.status
        waiting = len(living) - running
        return Health(status.state, status.reason, waiting, running, status.restarts, self._server_thread.silent)

    def requests(self) -> list[RequestInfo]:
        """All unfinished requests, oldest first: those waiting for room or for the engine, and those in it."""
        now = time.monotonic()
        return [
            RequestInfo(
                id=call.request.id,
                state="waiting" if call.began is None else "running",
                client=call.request.client,
                age=now - call.request.created,
                tokens=call.tokens,
            )
            for call in self._server_thread.living()
        ]

    @property
    def metrics(self) -> Metrics:
        """Counters since the bridge was built; ``lmbridge.prometheus`` exports them."""
        return self._server_thread.metrics

    def stats(self) -> dict[str, float]:
        """The engine's own counters (``in_flight``, ``steps``, ``tokens`` …); empty while no engine is loaded."""
        return self._server_thread.ask_engine(lambda engine: engine.stats()) or {}

    def supports(self) -> frozenset[str]:
        """The GenerationConfig fields that the engine supports; empty while none is loaded. Never blocks."""
        engine = self._server_thread.engine
        return frozenset() if engine is None else engine.supports

    def tasks(self) -> frozenset[Task]:
        """The tasks of the current or last engine (``generate``, ``embed``, …); empty before the first is loaded.

        Never blocks.
        """
        return self._server_thread.status.tasks

    def describe(self) -> str:
        """The model, its engine and how it runs; only the model while no engine is loaded. Never blocks."""
        engine = self._server_thread.engine
        return self._server_thread.label if engine is None else engine.describe()

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, for tables of log-probabilities; "" where the engine does not know it."""
        texts = self._server_thread.ask_engine(lambda engine: engine.token_texts(token_ids))
        return [""] * len(token_ids) if texts is None else texts

    def __repr__(self) -> str:
        living = self.requests()
        clients = len({request.client for request in living})
        return f"<Bridge {self.state} model={self._server_thread.label} clients={clients} in_flight={len(living)}>"

    def _account(self) -> Account:
        try:
            found: Account = self._threads.account
        except AttributeError:
            found = self._threads.account = Account(self._access, f"thread-{threading.get_ident()}")
        return found

    def _task_account(self) -> Account:
        return Account(self._access, f"task-{id(asyncio.current_task())}")


def _recipe(model: Any, engine: str, options: dict[str, Any]) -> Recipe:
    if isinstance(model, (str, Path)):
        factory = engine_factory(named_engine(engine, str(model)), str(model), options)
        return Recipe(factory, shown_url(str(model)), rebuildable=True)
    if (around := engine_around(model, options)) is not None:
        return Recipe(lambda: around, around.describe(), rebuildable=False)
    if options:
        raise InvalidRequestError(
            f"The option {next(iter(options))!r} needs a model given by name; pass it to the engine you build instead."
        )
    if isinstance(model, Engine):
        return Recipe(lambda: model, model.describe(), rebuildable=False)
    if callable(model):
        _check_builder(model)
        return Recipe(model, getattr(model, "__name__", type(model).__name__), rebuildable=True)
    raise InvalidRequestError(
        f"model must be a name, a folder, an Engine or a function that builds one, not {type(model).__name__}.", "model"
    )


def _check_builder(build: Callable[..., Any]) -> None:
    """Refuse a function that requires arguments."""
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):  # no signature to inspect
        return
    try:
        signature.bind()
    except TypeError as cause:
        name = getattr(build, "__name__", type(build).__name__)
        raise InvalidRequestError(
            f"{name} requires arguments; a function that builds an Engine takes none. To share a function that maps a "
            f"list to a list, or yields one prompt's answer, pass Bridge a function_engine({name}).",
            "model",
        ) from cause


def _placed(model: Any, engine: str, options: dict[str, Any], device: Any) -> Recipe:
    """The recipe for a model on a device; the device's name is passed to engines that accept it."""
    if device is None:
        return _recipe(model, engine, options)
    place = device if isinstance(device, Device) else Device.of(device)
    if isinstance(model, (str, Path)):
        engine = named_engine(engine, str(model))
        if "device" in inspect.signature(engine_class(engine)).parameters:
            options = {**options, "device": device.name if isinstance(device, Device) else device}
    return dataclasses.replace(_recipe(model, engine, options), device=place)


def _checked_weight(value: Any) -> float:
    weight = as_number(value)
    if weight is None or not 0.001 <= weight <= 1000:
        raise InvalidRequestError(f"weight must be a number from 0.001 to 1000, not {value!r}.", "weight")
    return float(weight)


def _check_seconds(**times: Any) -> None:
    """Check times that may also be None."""
    for name, value in times.items():
        if value is not None:
            checked_seconds(value, name)


def _check_limits(max_pending: Any, per_client: Any, when_full: Any) -> None:
    for name, value in (("max_pending", max_pending), ("max_pending_per_client", per_client)):
        limit = as_int(value)
        if limit is None or limit < 1:
            raise InvalidRequestError(f"{name} must be an int >= 1, not {value!r}.", name)
    if when_full not in ("block", "reject"):
        raise InvalidRequestError(f"when_full must be 'block' or 'reject', not {when_full!r}.", "when_full")
