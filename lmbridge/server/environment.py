"""Refuses processes in which the server thread could not be a real thread.

Rule: inspects the process, and imports nothing when called: an exception thrown into an import leaves its lock held.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from lmbridge.errors import UnsupportedEnvironmentError


def check_environment() -> None:
    """Refuse processes without real threads."""
    patched = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", lambda name: False)("threading")
    eventlet = getattr(sys.modules.get("eventlet.patcher"), "is_monkey_patched", lambda name: False)("thread")
    if patched or eventlet:
        raise UnsupportedEnvironmentError(
            "threading is patched by gevent or eventlet, so the server thread would be a greenlet and block every "
            "other one. Use real threads: gunicorn -k gthread, for example."
        )
    if IN_SUBINTERPRETER:
        raise UnsupportedEnvironmentError(
            "This is a subinterpreter; torch and other native libraries need the main one. Build the Bridge there."
        )


def _in_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # before Python 3.13
        try:
            interpreters: Any = importlib.import_module(name)
        except ImportError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


IN_SUBINTERPRETER = _in_subinterpreter()  # each interpreter imports this module anew
