"""The log, and other people's exceptions in words.

Rule: for any thread; imports nothing of lmbridge. A handler, a filter or a ``repr`` that raises ends no thread of ours.
"""

from __future__ import annotations

import logging
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
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def said(error: BaseException) -> str:
    """What an exception says of itself, without a full stop; what it looks like where it says nothing."""
    try:
        return str(error).rstrip(".") or shown(error)
    except Exception:
        return shown(error)
