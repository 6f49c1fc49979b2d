"""The Bridge: verbs and lifetime, nothing else.

Rule: used from any thread but the server's. It puts the parts together and keeps each thread's own client.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmbridge.admission import Gate
from lmbridge.chat import Chat
from lmbridge.client import Client
from lmbridge.engines import engine_factory
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, RequestAbortedError
from lmbridge.messages import GenerationConfig
from lmbridge.supervisor import State, Supervisor
from lmbridge.verbs import Verbs

Model = str | Path | Engine | Callable[[], Engine]


@dataclass(frozen=True)
class RequestInfo:
    """One living request, as ``bridge.requests()`` lists it; ``age`` in seconds, ``tokens`` generated so far."""

    id: str
    state: Literal["waiting", "running"]
    client: str
    age: float
    tokens: int


class Bridge(Verbs):
    """Lets any number of threads share one LLM engine.

    Nothing is loaded before the first call, ``start()`` or ``with``.

    Args:
        model: ``"demo"`` (the bundled model), a folder, a hub id, an Engine, or a function that builds one. Only what
            was given by name or as a function can be rebuilt after the engine has died.
        engine: the engine's name, for a model given by name.
        timeout: default deadline of every call, in seconds; None waits forever.
        max_pending: how many requests may wait for the engine.
        max_pending_per_client: how many of them may be one client's.
        when_full: ``"block"`` has callers wait for room up to their deadline, ``"reject"`` raises QueueFullError.
        engine_options: the engine's own options.

    Raises:
        ModelNotFoundError, UnknownEngineError, InvalidRequestError: what was given cannot work.
    """

    def __init__(
        self,
        model: Model,
        engine: str = "transformers",
        *,
        timeout: float | None = None,
        max_pending: int = 1024,
        max_pending_per_client: int = 256,
        when_full: Literal["block", "reject"] = "block",
        **engine_options: Any,
    ) -> None:
        _check_limits(max_pending, max_pending_per_client, when_full, timeout)
        factory, self._label, rebuildable = _resolve(model, engine, engine_options)
        gate = Gate(max_pending, max_pending_per_client, reject=when_full == "reject")
        self._supervisor = Supervisor(factory, rebuildable, gate, timeout)
        self._threads = threading.local()  # .client: the thread's own client, dropped when the thread ends

    # --- lifetime ---

    def start(self, timeout: float | None = None) -> Bridge:
        """Load the model now and block until it is ready, at most ``timeout`` seconds.

        Raises:
            EngineStartError: it could not be loaded.
            RequestTimeoutError: it was not ready in time; loading goes on.
        """
        self._supervisor.start(timeout)
        return self

    def close(self, *, drain: bool = False, timeout: float = 10.0) -> None:
        """End the bridge: refuse new calls, then finish (``drain``) or abort what runs, and free the model.

        Safe from any thread and more than once. Every waiting call ends with an answer or BridgeClosedError.

        Args:
            drain: let running and waiting requests finish.
            timeout: seconds for that; what is left then is aborted.
        """
        self._supervisor.close(drain, timeout)

    def __enter__(self) -> Bridge:
        return self.start()

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.close(drain=exc_type is None, timeout=60.0)

    def __del__(self) -> None:
        # A finalizer may run in the middle of anything: no locks, no logging, no joining.
        supervisor = getattr(self, "_supervisor", None)
        if supervisor is not None and supervisor.drop():
            message = f"unclosed {self!r}; use `with Bridge(...)` or close()"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    # --- callers ---

    def client(self, name: str | None = None) -> Client:
        """A client of your own: a fairness account with its own pair of queues and the same verbs."""
        return Client(self._supervisor, name or f"client-{id(object()):x}", bridge=self)

    def chat(self, config: GenerationConfig | None = None, *, system: str | None = None) -> Chat:
        """A conversation that keeps its history; see ``lmbridge.chat.Chat``."""
        return Chat(self, config, system=system)

    def abort(self, request_id: str) -> None:
        """Abort the living request of that id; its caller gets RequestAbortedError. Unknown ids are ignored."""
        server = self._supervisor.running()
        if server is not None:
            error = RequestAbortedError(f"Request {request_id} was aborted by bridge.abort().")
            server.run_soon(lambda: server.abort_where(lambda call: call.request.id == request_id, error))

    # --- what can be seen ---

    @property
    def state(self) -> State:
        """``new``, ``loading``, ``ready``, ``restarting``, ``failed``, ``closing`` or ``closed``."""
        return self._supervisor.state

    def requests(self) -> list[RequestInfo]:
        """The living requests, oldest first: those that wait for the engine and those in it."""
        server = self._supervisor.running()
        calls = [] if server is None else list(server.living.values())
        now = time.monotonic()
        return [
            RequestInfo(
                id=call.request.id,
                state="waiting" if call.began is None else "running",
                client=call.request.client,
                age=now - call.request.created,
                tokens=call.tokens,
            )
            for call in calls
        ]

    def stats(self) -> dict[str, float]:
        """What the engine counts of itself (``in_flight``, ``steps``, ``tokens`` …); empty while there is none."""
        return self._supervisor.ask_engine(lambda engine: engine.stats()) or {}

    def __repr__(self) -> str:
        living = self.requests()
        clients = len({request.client for request in living})
        return f"<Bridge {self.state} model={self._label} clients={clients} in_flight={len(living)}>"

    def _client(self) -> Client:
        try:
            found: Client = self._threads.client
        except AttributeError:
            found = self._threads.client = Client(self._supervisor, f"thread-{threading.get_ident()}")
        return found


def _resolve(model: Any, engine: str, options: dict[str, Any]) -> tuple[Callable[[], Engine], str, bool]:
    """What builds the engine, what to call it, and whether it can be built again."""
    if isinstance(model, (str, Path)):
        return engine_factory(engine, str(model), options), str(model), True
    if options:
        raise InvalidRequestError(
            f"Options such as {next(iter(options))!r} go with a model given by name; give them to the engine itself."
        )
    if isinstance(model, Engine):
        return lambda: model, model.describe(), False
    if callable(model):
        return model, getattr(model, "__name__", type(model).__name__), True
    raise InvalidRequestError(
        f"model must be a name, a folder, an Engine or a function that builds one, not {type(model).__name__}.", "model"
    )


def _check_limits(max_pending: int, per_client: int, when_full: str, timeout: float | None) -> None:
    for name, value in (("max_pending", max_pending), ("max_pending_per_client", per_client)):
        if not isinstance(value, int) or value < 1:
            raise InvalidRequestError(f"{name} must be an int >= 1, not {value!r}.", name)
    if when_full not in ("block", "reject"):
        raise InvalidRequestError(f"when_full must be 'block' or 'reject', not {when_full!r}.", "when_full")
    if timeout is not None and not timeout >= 0:
        raise InvalidRequestError(f"timeout must be seconds >= 0 or None, not {timeout!r}.", "timeout")
