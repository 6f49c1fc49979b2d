"""Where a thread stands: for the message of one that hangs.

Rule: imports nothing of lmbridge. Any thread may ask about any other; it is only looked at, never held up.
"""

from __future__ import annotations

import gc
import sys
from pathlib import PurePath
from types import FrameType

DEPTH = 3  # frames that are told


def where_is(thread_id: int | None, depth: int = DEPTH) -> str:
    """The innermost ``depth`` Python frames of a running thread, the innermost first; "" without such a thread.

    For example ``models/modeling_llama.py:312 forward, called from generation/utils.py:2790 _sample``. A thread inside
    native code stands in the Python function that called it.
    """
    frame = frame_of(thread_id)
    places: list[str] = []
    while frame is not None and len(places) < depth:
        places.append(_place(frame))
        frame = frame.f_back
    return ", called from ".join(places)


def frame_of(thread_id: int | None) -> FrameType | None:
    """The innermost frame of a running thread."""
    # CPython 3.11 collects garbage in the midst of this, under its lock over all threads; a finalizer that needs the
    # lock, as that of a threading.local does, or another thread that starts or ends meanwhile, then stops the process.
    # Source: CPython's issue 106883, which 3.12 closed.
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread_id or 0)
    finally:
        if collects:
            gc.enable()


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(PurePath(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
