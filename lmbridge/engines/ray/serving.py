"""Connects this process to Ray Serve; deploys, inspects and deletes applications.

Rule: everything here blocks and runs on an engine's worker thread; Ray is imported inside. One process has one
connection to Ray, which its engines share.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmbridge.engines.ray.library import import_library
from lmbridge.engines.ray.options import RayOptions
from lmbridge.errors import InvalidRequestError

GONE_PATIENCE = 30.0
"""Seconds to wait for an application of the same name to be deleted."""
REPLICA = "lmbridge.replica"
"""What runs in a replica's process. By name, because it uses the bridge, which engines must not import."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve would log a line for each request."""
DEAD = ("DELETING", "DEPLOY_FAILED", "NOT_STARTED")
"""States of an application that does not answer and will not recover."""


@dataclass(frozen=True)
class Look:
    """Serve's status of an application.

    Attributes:
        state: ``DEPLOYING``, ``RUNNING``, ``UNHEALTHY`` (replicas are missing; Serve builds them), or one of ``DEAD``.
        running: how many of its replicas are running.
        message: Serve's reason for the state, if given.
    """

    state: str
    running: int
    message: str


class _Connection:
    """This process's connection to Ray: made by the first engine that needs it, closed by the last if made here.

    Ray shuts itself down at exit, before unclosed bridges end. So remaining applications are deleted before that, and
    nothing calls Ray afterwards, which would start it again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = 0  # guarded by _lock, as is the next
        self._made = False
        self.apps: set[str] = set()  # deployed from here; each added and removed in one atomic step
        self.ending = False  # the interpreter is exiting; set once, by its thread

    def join(self, address: str | None) -> None:
        """Connect to Ray and start Serve there."""
        import ray
        from ray import serve

        with self._lock:
            if self.ending:
                raise ConnectionError("The interpreter is ending, and Ray with it.")
            if not ray.is_initialized():
                local = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
                dashboard = {"include_dashboard": False} if local else {}
                ray.init(address=address, logging_level="WARNING", log_to_driver=False, **dashboard)
                self._made = True
                logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it logs each step
            atexit.unregister(self._end)
            atexit.register(self._end)  # the last to register is the first to be called
            self._engines += 1
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # does nothing if it is already running

    def leave(self) -> None:
        """Release one engine's use; the last one shuts down a Ray started on this machine."""
        import ray

        with self._lock:
            self._engines -= 1
            if not self._engines and self._made:
                self._made = False
                if not self.ending:
                    ray.shutdown()

    def _end(self) -> None:
        self.ending = True
        for app in list(self.apps):
            with contextlib.suppress(Exception):
                delete(app)


_connection = _Connection()


def join(address: str | None) -> None:
    """Connect to Ray, or start one on this machine; see ``leave``.

    Raises:
        MissingDependencyError: Ray is missing, or has changed.
        Exception: Ray's own, if there is no cluster at that address.
    """
    import_library()
    _connection.join(address)


def leave() -> None:
    """Undo ``join``."""
    _connection.leave()


def connected() -> bool:
    """Whether Ray is still connected: it may have been shut down. Any thread; never blocks."""
    import ray

    return bool(ray.is_initialized())


def ending() -> bool:
    """Whether Ray is gone or going because the interpreter is exiting. Any thread."""
    return _connection.ending


def _serve() -> Any:
    """Ray Serve, for a query: without a connection it would start a new Ray.

    Raises:
        ConnectionError: there is no connection.
    """
    from ray import serve

    if not connected():
        raise ConnectionError("Ray has been shut down in this process.")
    return serve


def application(args: Mapping[str, Any]) -> Any:
    """A Serve application of replicas, for ``serve.run`` and for the ``import_path`` of a Serve config file.

    Args:
        args: ``model``, and as :class:`RayEngine` has them ``inner_engine``, ``replicas``, ``num_cpus``, ``num_gpus``,
            ``runtime_env`` and the inner engine's own options.
    """
    known = {name: args[name] for name in _SETTINGS if name in args}
    inner = {name: value for name, value in args.items() if name not in _SETTINGS}
    return build(RayOptions(**known, inner=inner))


_SETTINGS = ("model", "inner_engine", "replicas", "num_cpus", "num_gpus", "runtime_env")


def build(options: RayOptions, **settings: Any) -> Any:
    """The requested application; ``settings`` override the deployment settings made here.

    A replica takes only as many requests as its engine computes at once: Serve balances only roughly, and a request
    could wait at one replica while another has room.
    """
    from ray import serve

    replica = importlib.import_module(REPLICA).Replica
    places = options.pattern().max_batch_size
    usual: dict[str, Any] = {
        "num_replicas": options.replicas,
        "ray_actor_options": options.actor,
        "max_ongoing_requests": places,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5.0,
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": 1,
        "logging_config": QUIET,
    }
    deployment = serve.deployment(replica, name="Replica", **{**usual, **settings})
    return deployment.bind(options.model, options.inner_engine, places, options.inner)


def deploy(app: str, options: RayOptions) -> None:
    """Start the replicas under this name, without waiting for them.

    Raises:
        InvalidRequestError: the name is already in use.
    """
    from ray.serve.api import RunTarget, run_many

    end = time.monotonic() + GONE_PATIENCE
    while (found := look(app)) is not None and found.state == "DELETING" and time.monotonic() < end:
        time.sleep(0.1)
    if found is not None:
        raise InvalidRequestError(
            f"Serve already has an application {app!r}. Use it: Bridge({app!r}, engine='ray', deploy=False). Or give "
            "another app name, or none.",
            param="app",
        )
    target = RunTarget(build(options), name=app, route_prefix=None, logging_config=QUIET)
    _connection.apps.add(app)
    run_many([target], wait_for_applications_running=False)


def look(app: str) -> Look | None:
    """Serve's status of an application; None if there is none with that name.

    Raises:
        ConnectionError: Ray has been shut down. Exception: Ray's own, if it does not answer.
    """
    found = _serve().status().applications.get(app)
    if found is None:
        return None
    deployments = found.deployments.values()
    running = sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments)
    messages = [deployment.message for deployment in deployments] or [found.message]
    return Look(str(found.status.value), running, " ".join(filter(None, messages)).strip())


def applications() -> list[str]:
    """The names of all of Serve's applications."""
    return sorted(_serve().status().applications)


def handle(app: str) -> Any:
    """The handle for sending requests."""
    return _serve().get_app_handle(app)


def delete(app: str) -> None:
    """End an application that was deployed here; returns once its processes have ended."""
    _connection.apps.discard(app)
    if connected():
        _serve().delete(app)
