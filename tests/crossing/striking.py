"""Strikes a thread between two bytecodes of our choice: Ctrl-C at the n-th, and what others throw in at random."""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_OBJECT = ctypes.py_object
# Extra arguments do no harm in C; a trace function gets three.
_interrupt = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, _OBJECT)(("PyErr_SetInterruptEx", ctypes.pythonapi))
_nothing = functools.partial(
    ctypes.PYFUNCTYPE(None, ctypes.c_int, _OBJECT, _OBJECT, _OBJECT)(("PyErr_SetInterruptEx", ctypes.pythonapi)), 0
)
# A trace function in which no Python runs, or Ctrl-C would strike in there: it sends one, and puts the one that does
# nothing in its place, which is what max() gives back, all keys being 0.
_STRIKE: Any = functools.partial(max, _nothing, key=functools.partial(_interrupt, signal.SIGINT))


class Thrown(BaseException):
    """What is thrown in."""


def throw_into(thread_id: int | None) -> None:
    """Have ``Thrown`` raised in a thread, when it runs its next bytecodes."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id or 0), ctypes.py_object(Thrown))


def ctrl_c(after: int, function: Callable[[], object]) -> str | None:
    """Call ``function`` in this, the main thread, and send it a Ctrl-C after so many bytecodes; what ran then.

    None: it had ended before. The interpreter raises KeyboardInterrupt where it would for a real one: not between any
    two bytecodes, but after a call, at the start of a function or at the end of a loop's turn.
    """
    strike, before = _Strike(after), sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 counts bytecodes only where somebody had asked before
    try:
        sys.settrace(strike.enter)
        function()
        sys.settrace(before)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return strike.where


class _Strike:
    """The trace function that counts."""

    def __init__(self, after: int) -> None:
        self.where: str | None = None
        self._left = after

    def enter(self, frame: FrameType, event: str, arg: object) -> Any:
        """A function is called."""
        if self.where is not None or "importlib" in frame.f_code.co_filename:  # struck there, Python's own lock is lost
            return None
        frame.f_trace = self._step  # first: Python 3.13 asks for it
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode" and self.where is None:
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                return _STRIKE
        return self._step
