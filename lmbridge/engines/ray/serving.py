"""Ray and its Serve as this process knows them: joined and left, applications deployed, looked at and deleted.

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
"""Seconds for an application of the same name that is being deleted to go."""
REPLICA = "lmbridge.replica"
"""What runs in a replica's process. By name, since it uses the bridge, which no engine knows."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve would log a line for each request."""
DEAD = ("DELETING", "DEPLOY_FAILED", "NOT_STARTED")
"""States of an application in which it answers nothing, and will not by itself."""


@dataclass(frozen=True)
class Look:
    """What Serve says of an application.

    Attributes:
        state: ``DEPLOYING``, ``RUNNING``, ``UNHEALTHY`` (replicas are missing; Serve builds them), or one of ``DEAD``.
        running: how many of its replicas do.
        message: why it is as it is, where Serve tells.
    """

    state: str
    running: int
    message: str


class _Connection:
    """This process's connection to Ray: made by the first engine that needs one, closed by the last if it was made.

    Ray ends itself at exit, before the bridges that nobody closed end. So what is left then is deleted before that, and
    nothing asks Ray for anything any more: it would start anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = 0  # guarded by _lock, as is the next
        self._made = False
        self.apps: set[str] = set()  # deployed from here; each entered and removed in one atomic step
        self.ending = False  # the interpreter ends; set once, by its thread

    def join(self, address: str | None) -> None:
        """Be connected to Ray, and have Serve run there."""
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
                logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of each step
            atexit.unregister(self._end)
            atexit.register(self._end)  # the last to register is the first to be called
            self._engines += 1
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # does nothing where it runs already

    def leave(self) -> None:
        """One engine less; a Ray that was started on this machine ends with the last of them."""
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
        Exception: Ray's own, where there is none at that address.
    """
    import_library()
    _connection.join(address)


def leave() -> None:
    """Give back what ``join`` gave."""
    _connection.leave()


def connected() -> bool:
    """Whether Ray is there still: somebody may have shut it down. Any thread; blocks for nothing."""
    import ray

    return bool(ray.is_initialized())


def ending() -> bool:
    """Whether Ray has gone, or is about to, since the interpreter ends. Any thread."""
    return _connection.ending


def _serve() -> Any:
    """Ray Serve, for a question: without a connection it would start a Ray to ask.

    Raises:
        ConnectionError: there is none.
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
    """The application that was asked for; ``settings`` are the deployment's, over those made here.

    A replica takes what its engine computes on at once and no more: Serve's choice among replicas is a rough one, and a
    request would wait at one while another has room.
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
    """Have Serve start the replicas, under this name; does not wait for them.

    Raises:
        InvalidRequestError: an application has that name already.
    """
    from ray.serve.api import RunTarget, run_many

    end = time.monotonic() + GONE_PATIENCE
    while (found := look(app)) is not None and found.state == "DELETING" and time.monotonic() < end:
        time.sleep(0.1)
    if found is not None:
        raise InvalidRequestError(
            f"Serve has an application {app!r} already. Use it: Bridge({app!r}, engine='ray', deploy=False). Or give "
            "another app, or none.",
            param="app",
        )
    target = RunTarget(build(options), name=app, route_prefix=None, logging_config=QUIET)
    _connection.apps.add(app)
    run_many([target], wait_for_applications_running=False)


def look(app: str) -> Look | None:
    """What Serve says of an application; None where there is none of that name.

    Raises:
        ConnectionError: Ray has been shut down. Exception: Ray's own, where it does not answer.
    """
    found = _serve().status().applications.get(app)
    if found is None:
        return None
    deployments = found.deployments.values()
    running = sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments)
    messages = [deployment.message for deployment in deployments] or [found.message]
    return Look(str(found.status.value), running, " ".join(filter(None, messages)).strip())


def applications() -> list[str]:
    """The names of all that Serve has."""
    return sorted(_serve().status().applications)


def handle(app: str) -> Any:
    """What requests are sent by."""
    return _serve().get_app_handle(app)


def delete(app: str) -> None:
    """End an application that was deployed here; returns when its processes have ended."""
    _connection.apps.discard(app)
    if connected():
        _serve().delete(app)
