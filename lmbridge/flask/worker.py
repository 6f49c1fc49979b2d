"""Finds out the role of the app's process: it serves, it forks serving processes, or neither.

Rule: looks at the process and at a request's WSGI environment; loads and logs nothing.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import click
from flask.cli import run_command
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Role = Literal["serves", "forks", "unknown"]

_SERVING = ("gunicorn.workers.", "waitress.runner.")  # modules that import an app in the process that serves it
_FORKING = ("gunicorn.",)  # with --preload, in gunicorn's master


def role() -> Role:
    """The role of this process, as far as the code that imports the app shows.

    Many processes that build an app do not serve it: tests, scripts, ``flask shell``, task queues, the reloader's
    parent. None of them should load a model, so a process counts as serving only if that is certain.
    """
    context = click.get_current_context(silent=True)
    if context is not None and context.command is run_command:
        return "unknown" if _watches_only(context) else "serves"
    modules = [f"{frame.f_globals.get('__name__')}." for frame, _ in traceback.walk_stack(None)]
    if any(module.startswith(_SERVING) for module in modules):
        return "serves"
    return "forks" if any(module.startswith(_FORKING) for module in modules) else "unknown"


def _watches_only(context: click.Context) -> bool:
    """Whether this is the parent process of ``flask run --debug``, which restarts the serving one after changes."""
    reload = context.params.get("reload")
    return bool(get_debug_flag() if reload is None else reload) and not is_running_from_reloader()


def after_fork(function: Callable[[], object]) -> None:
    """Call ``function`` in each worker that gunicorn's master, this process, forks from now on.

    Not in what else it forks: its own successor (USR2), and processes of the app's.
    """
    parent = os.getpid()

    def run() -> None:
        if os.getppid() == parent and _is_worker():
            function()

    os.register_at_fork(after_in_child=run)


def _is_worker() -> bool:
    """Whether the fork was made for a worker; gunicorn does not document ``spawn_worker``; tests notice if it goes."""
    return any(frame.f_code.co_name == "spawn_worker" for frame, _ in traceback.walk_stack(None))


def is_served(environ: WSGIEnvironment) -> bool:
    """Whether this request came through a server, not from a test client."""
    return "SERVER_SOFTWARE" in environ


def complaint(environ: WSGIEnvironment, copied: bool) -> str:
    """Advice on how to run the server that this request came through; empty if it suits.

    Args:
        copied: whether several processes mean several copies of a model.
    """
    faults = []
    if copied and environ.get("wsgi.multiprocess"):
        faults.append("runs several processes, each with its own copy of the model and its own batch")
    if not environ.get("wsgi.multithread", True):
        faults.append("handles one request at a time, so requests cannot share a batch")
    if not faults:
        return ""
    return f"The server {', and '.join(faults)}. Run one process with threads: gunicorn -w 1 -k gthread --threads 32"
