"""The log, and other people's exceptions in words.

Rule: for any thread; imports nothing of lmbridge. A handler, a filter or a ``repr`` that raises ends no thread of ours.
"""

from __future__ import annotations

import logging
import threading
from typing import Any


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Says what it can: a handler whose disk is full must not cost the callers their answers."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **{"stacklevel": 2, **kwargs})
        except Exception:
            return


logger = _Logger(logging.getLogger("lmbridge"), {})
"""The logger ``lmbridge`` as the threads of a bridge use it."""


def shown(value: object) -> str:
    """``repr(value)``, or its type where that raises."""
    try:
        return repr(value)
    except BaseException as raised:
        _let_ctrl_c_by(raised)
        return f"<{type(value).__name__} that cannot be shown>"


def said(error: BaseException) -> str:
    """What an exception says of itself, without a full stop; what it looks like where it says nothing."""
    try:
        return str(error).rstrip(".") or shown(error)
    except BaseException as raised:
        _let_ctrl_c_by(raised)
        return shown(error)


def _let_ctrl_c_by(raised: BaseException) -> None:
    """What somebody's ``repr`` raises is swallowed, ``SystemExit`` too; the user's own Ctrl-C is not."""
    if isinstance(raised, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise raised
