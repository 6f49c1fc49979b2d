"""Shuts the server down: handles signals, lets answers finish, and aborts the rest.

Rule: every wait has a limit, and a second signal ends the process at once.
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
    """Refuse new requests, and let running ones finish."""
    server.closing = models.draining = True
    if front.inside:
        print(f"Finishing {front.inside} answers (at most {timeout:g} s); a second Ctrl-C or signal ends at once.")
        sys.stdout.flush()
    end = time.monotonic() + timeout
    if front.wait_until_empty(timeout):
        server.wait_until_sent(end - time.monotonic())
    else:
        print(f"Answers aborted after {timeout:g} s: {front.inside}", flush=True)


def end(server: HttpServer, front: Front, models: Models) -> None:
    """Abort the remaining answers, and give each part a bounded time to end."""
    # Engines collect garbage when they close, and so does the interpreter at exit. With torch and transformers loaded,
    # each collection takes 0.2 s, and this process is about to end anyway.
    gc.freeze()
    server.closing = models.draining = True
    closing = threading.Thread(target=models.close, kwargs={"timeout": 0.0}, daemon=True)
    closing.start()
    front.wait_until_empty(FLUSH)
    server.close()
    closing.join(FLUSH)


class Signals:
    """Handles SIGTERM and Ctrl-C: notes the first signal; the second ends the process at once."""

    def __init__(self) -> None:
        self.came = False
        self._first: queue.SimpleQueue[int] = queue.SimpleQueue()  # reentrant: the handler may interrupt get
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Wait for the first signal."""
        self._first.get()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True
        self._first.put(number)
