"""What of Ray the engine relies on, checked before anything is started.

Rule: Ray is imported inside the functions only, on the engine's worker thread. What is named here is everything that
the other files use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from lmbridge.engines.parts import find, missing_parameters
from lmbridge.errors import MissingDependencyError

INSTALL = 'pip install "lmbridge[ray]"'

PARAMETERS = {
    "ray:init": ("address", "include_dashboard", "log_to_driver", "logging_level"),
    "ray:is_initialized": (),
    "ray:shutdown": (),
    "ray.serve:start": ("proxy_location", "logging_config"),
    "ray.serve:status": (),
    "ray.serve:delete": ("name",),
    "ray.serve:get_app_handle": ("name",),
    "ray.serve:deployment": (
        "name", "num_replicas", "ray_actor_options", "max_ongoing_requests", "graceful_shutdown_wait_loop_s",
        "graceful_shutdown_timeout_s", "health_check_period_s", "max_constructor_retry_count", "logging_config",
    ),
    "ray.serve.api:RunTarget": ("target", "name", "route_prefix", "logging_config"),
    "ray.serve.api:run_many": ("targets", "wait_for_applications_running"),
    "ray.serve.handle:DeploymentHandle.options": ("method_name", "stream"),
    "ray.serve.handle:DeploymentResponseGenerator.cancel": (),
}  # fmt: skip
"""Callable to the parameters given to it."""

ERRORS = (
    "ray.exceptions:RayError",
    "ray.exceptions:RayTaskError",
    "ray.serve.exceptions:RayServeException",
    "ray.serve.exceptions:BackPressureError",
    "ray.serve.exceptions:DeploymentUnavailableError",
)


def import_library() -> None:
    """Import Ray Serve.

    Raises:
        MissingDependencyError: it is not installed, or lacks what this engine relies on; the message names what.
    """
    try:
        importlib.import_module("ray.serve")
    except ImportError as cause:
        raise MissingDependencyError(f"The engine 'ray' needs Ray Serve ({cause}): {INSTALL}") from cause
    missing = list(_missing())
    if missing:
        version = importlib.import_module("ray").__version__
        raise MissingDependencyError(
            f"ray {version} lacks what this adapter relies on: {', '.join(missing)}. Use a version it was tested with "
            "(pip install 'ray[serve]==2.60.0'), or a newer lmbridge."
        )


def _missing() -> Iterator[str]:
    yield from missing_parameters(PARAMETERS)
    yield from (where.partition(":")[2] for where in ERRORS if find(where) is None)
