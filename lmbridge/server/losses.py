"""How an engine can be lost: the messages, and the advice.

Rule: pure functions. The reader may be at a command line, behind HTTP or in a program, so the advice fits all.
"""

from __future__ import annotations

import threading

from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.log import said, shown
from lmbridge.server.place import Place


def died(cause: BaseException) -> str:
    return f"the engine died: {shown(cause)}"


def not_again(cause: BaseException) -> str:
    return f"the engine could not be loaded again: {shown(cause)}"


def start_error(cause: BaseException) -> EngineStartError:
    """The error of every call while the failed engine is not replaced."""
    if _is_late(cause):
        return _error(
            "The main thread ended before the model was loaded, and Python then starts no thread pools, which loading "
            "needs. Load the model first (bridge.start()), or join your threads.",
            cause,
        )
    return _error(f"The engine could not be loaded: {said(cause)}. Fix this, then restart.", cause)


def swap_error(cause: BaseException, place: Place | None, unloaded: bool = False) -> LMBridgeError:
    """The error of a swap whose new model could not be loaded.

    Args:
        place: the current engine's place.
        unloaded: there is no engine, because the idle model was unloaded.
    """
    if isinstance(cause, LMBridgeError):
        return cause
    return _error(f"The new model could not be loaded: {said(cause)}. {_goes_on(place, unloaded)}", cause)


def _is_late(cause: BaseException) -> bool:
    """Whether this is how ``concurrent.futures`` and ``threading`` fail once the main thread has ended."""
    return isinstance(cause, RuntimeError) and "shutdown" in str(cause) and not threading.main_thread().is_alive()


def _goes_on(place: Place | None, unloaded: bool) -> str:
    if place is None and unloaded:
        return "The next call loads the old model again."
    if place is None:
        return "No model is serving: fix this, then swap again."
    if place.dead.done():
        return "The old model has died meanwhile and is being reloaded."
    return "The old model keeps serving."


def _error(message: str, cause: BaseException) -> EngineStartError:
    error = EngineStartError(message)
    error.__cause__ = cause
    return error
