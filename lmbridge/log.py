"""The logger, and safe descriptions of foreign values and exceptions.

Rule: for any thread; imports nothing of lmbridge. A handler, a filter or a ``repr`` that raises ends no thread of ours.
"""

from __future__ import annotations

import logging
import threading
from typing import Any


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Survives a failing handler: a full disk must not cost callers their answers."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **{"stacklevel": 2, **kwargs})
        except Exception:
            return


logger = _Logger(logging.getLogger("lmbridge"), {})
"""The logger ``lmbridge`` as used by a bridge's threads."""


def shown(value: object) -> str:
    """``repr(value)``, or the type if that raises."""
    try:
        return repr(value)
    except BaseException as raised:
        _let_ctrl_c_by(raised)
        return f"<{type(value).__name__} that cannot be shown>"


def said(error: BaseException) -> str:
    """An exception's text without its full stop; its repr if the text is empty, or just the key that was not found."""
    try:
        return shown(error) if isinstance(error, KeyError) else str(error).rstrip(".") or shown(error)
    except BaseException as raised:
        _let_ctrl_c_by(raised)
        return shown(error)


def _let_ctrl_c_by(raised: BaseException) -> None:
    """Swallow whatever a foreign ``repr`` raises, even ``SystemExit``, but not the user's Ctrl-C."""
    if isinstance(raised, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise raised
