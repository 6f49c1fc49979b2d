"""The bridges of one app, by their names for clients.

Rule: ``app.extensions["lmbridge"]`` is the app's ``Models``. It builds the bridges, which loads nothing; each starts at
its first use, or earlier with LMBRIDGE_PRELOAD, but always in the serving process, so a server may fork before that.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Request, current_app
from werkzeug.local import LocalProxy

from lmbridge.bridge import Bridge
from lmbridge.engines import engine_class, engine_factory, named_engine
from lmbridge.engines.auto import AUTO
from lmbridge.errors import BridgeClosedError, InvalidRequestError, ModelNotFoundError, UnsupportedTaskError
from lmbridge.flask.config import ModelSource, Settings
from lmbridge.flask.loading import load, logger, show_in_console
from lmbridge.flask.worker import after_fork, complaint, is_served, role
from lmbridge.messages import GenerationConfig, Task

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

EXTENSION = "lmbridge"
_EVERYTHING = frozenset(GenerationConfig().__dict__)  # while unknown: the engine itself refuses what it cannot do
_BRIDGE_OPTIONS = frozenset(inspect.signature(Bridge).parameters)
_NOT_PRELOADED = (
    "LMBRIDGE_PRELOAD had no effect: it supports gunicorn, waitress-serve and `flask run`. Under another server, or in "
    "a program of your own, call lm.preload(app) in the serving process."
)
VERBS: dict[Task, str] = {"generate": "generate text", "embed": "embed", "rerank": "rerank", "call": "call a function"}


class Models:
    """The named bridges of one app.

    Attributes:
        settings: as configured.
        account: maps an HTTP request to its account in the fair queue.
        draining: set once shutdown has begun; new requests are refused.
        disconnects: HTTP requests whose client disconnected; ``count_disconnect`` adds one.
    """

    def __init__(self, settings: Settings, account: Callable[[Request], str] | None = None) -> None:
        self.settings = settings
        self.account = account or self._default_account
        self.draining = False
        self.disconnects = 0  # guarded by _lock when written
        self._lock = threading.Lock()
        self._loading: dict[str, Bridge] = {}  # those whose loading was started here; guarded by _lock
        self._elsewhere: set[str] = set()  # models that another server runs
        self._looked = False  # whether the server was checked; set by any thread
        self._created = int(time.time())
        self._own: list[Bridge] = []  # built here and closed with the app, unlike bridges passed in
        self._tasks: dict[str, frozenset[Task]] = {}  # as last seen; set in one atomic step by any thread
        self._supports: dict[str, frozenset[str]] = {}  # of engines that are not loaded yet
        self._bridges = {name: self._build(name, source) for name, source in settings.models.items()}

    @property
    def default(self) -> str:
        """The name of the model for requests that do not name one."""
        return next(iter(self._bridges))

    def names(self) -> list[str]:
        return list(self._bridges)

    def created(self, name: str) -> int:
        """When the model was made available, in Unix seconds."""
        self.bridge(name)
        return self._created

    def bridge(self, name: str | None = None) -> Bridge:
        """The bridge of that name, or the default one.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        try:
            return self._bridges[self.default if name is None else name]
        except KeyError:
            raise ModelNotFoundError(
                f"There is no model {name!r} on this server; its models are {', '.join(self._bridges)}."
            ) from None

    def tasks(self, name: str) -> frozenset[Task]:
        """The model's tasks: ``generate``, ``embed``, ``rerank``. Empty while unknown."""
        found = self.bridge(name).tasks()  # empty until the model is loaded
        if found:
            self._tasks[name] = found
        return self._tasks.get(name, frozenset())

    def supports(self, name: str) -> frozenset[str]:
        """The GenerationConfig fields that the model's engine supports, or will once loaded; all while unknown."""
        bridge = self.bridge(name)
        found = bridge.supports()
        return found if found or bridge.state == "ready" else self._supports.get(name, _EVERYTHING)

    def chosen(self, name: str | None, task: Task, timeout: float | None = None) -> str:
        """Choose the model for a request: the one it names, else the first that supports the task.

        A model's tasks may be unknown until it is loaded. A named model is then chosen, and refuses the task itself if
        need be; without a name, the models are loaded one after another until one supports the task.

        Args:
            timeout: seconds for loading, if necessary.

        Raises:
            ModelNotFoundError: there is no model of that name.
            UnsupportedTaskError: the named model does not support the task; the message names those that do.
            LMBridgeError: finding out takes too long, or a model could not be loaded.
        """
        if name is None:
            return self._first(task, timeout)
        known, able = self.tasks(name), self._able(task)
        if known and able and task not in known:
            raise UnsupportedTaskError(
                f"The model {name!r} cannot {VERBS[task]}; use {' or '.join(able)} instead.", "model"
            )
        return name

    def _able(self, task: Task) -> list[str]:
        """The models known to support the task."""
        return [name for name in self.names() if task in self.tasks(name)]

    def _first(self, task: Task, timeout: float | None) -> str:
        """The first model that supports the task; if none does, the default one, whose error says what it supports."""
        unknown = [name for name in self.names() if not self.tasks(name)]
        until = None if timeout is None else time.monotonic() + timeout
        while not (able := self._able(task)) and len(unknown) > 1:
            first = unknown.pop(0)
            self.load(first)
            self.bridge(first).start(None if until is None else max(0.0, until - time.monotonic()))
        return next(iter(able or unknown), self.default)

    def preload(self) -> None:
        """Start loading every model in the background; in a process that forks the serving ones, after the fork."""
        if role() == "forks":
            load_all = weakref.WeakMethod(self._load_all)
            after_fork(lambda: (method := load_all()) and method())
        else:
            self._load_all()

    def _load_all(self) -> None:
        show_in_console()
        for name in self.names():
            self.load(name)

    def load(self, name: str) -> None:
        """Start loading the model in the background, unless that has already begun."""
        bridge = self.bridge(name)
        if bridge.state != "new":
            return
        with self._lock:
            if self._loading.get(name) is bridge:
                return
            self._loading[name] = bridge
        load(name, bridge)

    def look_at(self, environ: WSGIEnvironment) -> None:
        """Check the server at its first request, and log a warning if it does not suit."""
        if self._looked or not is_served(environ):
            return
        self._looked = True
        show_in_console()
        if text := complaint(environ, copied=self._elsewhere < set(self.names())):
            logger.warning("%s", text)
        if self.settings.preload and any(self.bridge(name).state == "new" for name in self.names()):
            logger.warning("%s", _NOT_PRELOADED)

    def check_open(self) -> None:
        """Raise BridgeClosedError once shutdown has begun."""
        if self.draining:
            raise BridgeClosedError("The server is shutting down and accepts no new requests; try again later.")

    def count_disconnect(self) -> None:
        """Count one disconnected client. Any thread."""
        with self._lock:
            self.disconnects += 1

    def replace(self, name: str, bridge: Bridge) -> Bridge:
        """Replace the bridge of that name, and return the old one. For tests; see ``testing``."""
        old, self._bridges[name] = self.bridge(name), bridge
        self._tasks.pop(name, None)
        self._supports.pop(name, None)
        return old

    def close(self, *, drain: bool = False, timeout: float = 10.0) -> None:
        """Refuse new requests, and close the bridges that the app built; ``drain`` and ``timeout`` as for a Bridge."""
        self.draining = True
        until = time.monotonic() + timeout
        if not drain:
            for bridge in self._own:  # signal all before waiting for the first
                bridge._server_thread.drop()
        for bridge in self._own:
            bridge.close(drain=drain, timeout=max(0.0, until - time.monotonic()))

    def _build(self, name: str, source: ModelSource) -> Bridge:
        if isinstance(source, Bridge):
            return source
        options: dict[str, Any] = dict(source) if isinstance(source, Mapping) else {"model": source}
        if "model" not in options:
            raise InvalidRequestError(f"LMBRIDGE_MODELS: {name!r} has no 'model'; add it.", "LMBRIDGE_MODELS")
        settings = self.settings
        for option in ("timeout", "max_pending", "max_pending_per_client", "when_full", "stall_timeout"):
            if option in options:
                raise InvalidRequestError(
                    f"LMBRIDGE_MODELS: {option} of {name!r} applies to all models; set LMBRIDGE_{option.upper()}.",
                    "LMBRIDGE_MODELS",
                )
        model, engine = options.pop("model"), options.pop("engine", AUTO)
        bridge = Bridge(
            model,
            engine,
            timeout=settings.timeout,
            max_pending=settings.max_pending,
            max_pending_per_client=settings.max_pending_per_client,
            when_full=settings.when_full,
            stall_timeout=settings.stall_timeout,
            **options,
        )
        self._own.append(bridge)
        if isinstance(model, (str, Path)):
            engine = named_engine(engine, str(model))
            if engine == "openai":
                self._elsewhere.add(name)
            self._tasks[name] = _tasks_of(engine, options.get("task"))
            own = {option: value for option, value in options.items() if option not in _BRIDGE_OPTIONS}
            self._supports[name] = engine_factory(engine, str(model), own)().supports
        return bridge

    def _default_account(self, request: Request) -> str:
        """The digest of the API key, or the address. Without configured keys, clients could make up any key."""
        authorization = request.authorization
        if self.settings.api_keys and authorization is not None and authorization.token:
            return f"key-{hashlib.sha256(authorization.token.encode()).hexdigest()[:12]}"
        return request.remote_addr or "unknown"


def _tasks_of(engine: str, wanted: Any) -> frozenset[Task]:
    """The tasks of an engine that is not loaded yet, given its option ``task`` if any; empty: the model decides."""
    if wanted in ("embed", "rerank"):
        return frozenset({wanted})
    found = engine_class(engine)
    return frozenset() if "task" in inspect.signature(found).parameters else found.tasks


def current_models() -> Models:
    """The models of the current app.

    Raises:
        RuntimeError: there is no current app, or the extension was not initialised for it.
    """
    return models_of(current_app)


def models_of(app: Any) -> Models:
    """The models of ``app``; raises RuntimeError if it has none."""
    found = app.extensions.get(EXTENSION)
    if found is None:
        name = (app._get_current_object() if isinstance(app, LocalProxy) else app).name
        raise RuntimeError(
            f"LMBridge is not initialised for the Flask app {name!r}; did you forget LMBridge(app) or lm.init_app(app)?"
        )
    assert isinstance(found, Models)
    return found
