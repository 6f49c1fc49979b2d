"""What a thread is executing, for messages about a hang.

Rule: imports nothing of lmbridge. Any thread may inspect any other; the other is not delayed.
"""

from __future__ import annotations

import gc
import sys
from pathlib import PurePath
from types import FrameType

DEPTH = 3  # frames reported


def where_is(thread_id: int | None, depth: int = DEPTH) -> str:
    """The innermost ``depth`` Python frames of a running thread, innermost first; "" without such a thread.

    For example ``models/modeling_llama.py:312 forward, called from generation/utils.py:2790 _sample``. A thread in
    native code shows the Python function that called it.
    """
    frame = frame_of(thread_id)
    places: list[str] = []
    while frame is not None and len(places) < depth:
        places.append(_place(frame))
        frame = frame.f_back
    return ", called from ".join(places)


def frame_of(thread_id: int | None) -> FrameType | None:
    """The innermost frame of a running thread."""
    # CPython 3.11 may collect garbage during this call, under its lock over all threads; a finalizer that needs the
    # lock, as a threading.local's does, or a thread starting or ending meanwhile, then deadlocks the process. Source:
    # CPython issue 106883, fixed in 3.12.
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
