"""Keeps processes started by libraries from running the user's script.

Rule: any thread; standard library only.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ModuleSpec


class WithoutMain:
    """While entered, processes started by a library (a GPU probe, its ranks) do not run the user's script.

    A spawned process imports the script first; without the ``__main__`` guard it would build its own engine there. A
    library's processes do not need it, and multiprocessing skips a main module whose name ends in ``__main__``. The
    danger: a process spawned meanwhile by the user's own threads does not find the script's functions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0  # guarded by _lock, like the next; two engines may load at once
        self._spec: ModuleSpec | None = None

    def __enter__(self) -> None:
        with self._lock:
            main = sys.modules["__main__"]
            if self._entered == 0:
                self._spec, main.__spec__ = main.__spec__, ModuleSpec("lmbridge.__main__", None)
            self._entered += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                sys.modules["__main__"].__spec__ = self._spec


without_main = WithoutMain()
"""The instance for this process."""
