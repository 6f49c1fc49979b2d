"""The end of a server: signals, answers that may finish, and the rest that is cut.

Rule: each wait has a limit, and a second signal ends the process at once.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmbridge.flask.http_server import HttpServer
    from lmbridge.flask.models import Models
    from lmbridge.flask.serving import Front

FLUSH = 1.0  # seconds for the last bytes of aborted answers


def drain(server: HttpServer, front: Front, models: Models, timeout: float) -> None:
    """Refuse what is new, and let what runs finish."""
    server.closing = models.draining = True
    if front.inside:
        print(f"Finishing {front.inside} answers, for {timeout:g} s at most; a second Ctrl-C or signal ends at once.")
        sys.stdout.flush()
    end = time.monotonic() + timeout
    if front.wait_until_empty(timeout):
        server.wait_until_sent(end - time.monotonic())
    else:
        print(f"Answers aborted after {timeout:g} s: {front.inside}", flush=True)


def end(server: HttpServer, front: Front, models: Models) -> None:
    """Abort what is left, and give each part a bounded time to end."""
    # Engines collect garbage as they close, and so does the interpreter at its own end. Each time is 0.2 s with what
    # torch and transformers keep, and this process needs none of it any more.
    gc.freeze()
    server.closing = models.draining = True
    closing = threading.Thread(target=models.close, kwargs={"timeout": 0.0}, daemon=True)
    closing.start()
    front.wait_until_empty(FLUSH)
    server.close()
    closing.join(FLUSH)


class Signals:
    """SIGTERM and Ctrl-C: the first is kept to be looked at, the second ends the process at once."""

    def __init__(self) -> None:
        self.came = False
        self._first: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be put to by what interrupts its own get
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Return when the first has come."""
        self._first.get()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True
        self._first.put(number)
