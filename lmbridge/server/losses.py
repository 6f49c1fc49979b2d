"""How an engine can be lost, in words, and whether there is hope.

Rule: pure functions. Whoever reads this may sit at a command line, behind HTTP or in a program, so the advice fits all.
"""

from __future__ import annotations

from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.log import said, shown
from lmbridge.server.place import Place


def died(cause: BaseException) -> str:
    return f"the engine died: {shown(cause)}"


def not_again(cause: BaseException) -> str:
    return f"the engine could not be loaded again: {shown(cause)}"


def start_error(cause: BaseException) -> EngineStartError:
    """What everybody gets while an engine that could not be loaded is not replaced."""
    return _error(f"The engine could not be loaded: {said(cause)}. Fix that, then start anew.", cause)


def swap_error(cause: BaseException, place: Place | None, unloaded: bool = False) -> LMBridgeError:
    """What whoever asked for a swap gets when the new model cannot be loaded.

    Args:
        place: what has the engine's place now.
        unloaded: nothing has it, because there was nothing to do.
    """
    if isinstance(cause, LMBridgeError):
        return cause
    return _error(f"The new model could not be loaded: {said(cause)}. {_goes_on(place, unloaded)}", cause)


def _goes_on(place: Place | None, unloaded: bool) -> str:
    if place is None and unloaded:
        return "The old one is loaded again for the next call."
    if place is None:
        return "Nothing serves now: fix that, then swap again."
    if place.dead.done():
        return "The old one has died meanwhile, and is loaded again."
    return "The old one serves on."


def _error(message: str, cause: BaseException) -> EngineStartError:
    error = EngineStartError(message)
    error.__cause__ = cause
    return error
