"""Where a thread stands: for the message of one that hangs.

Rule: imports nothing of lmbridge. Any thread may ask about any other; it is only looked at, never held up.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import FrameType

DEPTH = 3  # frames that are told


def where_is(thread_id: int | None, depth: int = DEPTH) -> str:
    """The innermost ``depth`` Python frames of a running thread, the innermost first; "" without such a thread.

    For example ``models/modeling_llama.py:312 forward, called from generation/utils.py:2790 _sample``. A thread inside
    native code stands in the Python function that called it.
    """
    frame = sys._current_frames().get(thread_id or 0)
    places: list[str] = []
    while frame is not None and len(places) < depth:
        places.append(_place(frame))
        frame = frame.f_back
    return ", called from ".join(places)


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(PurePath(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
