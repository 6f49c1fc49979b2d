"""Loads a model in the background, and logs the progress.

Rule: each load has its own thread, which waits for the bridge and writes to the log; nobody waits for the thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

from flask.logging import default_handler

from lmbridge.bridge import Bridge
from lmbridge.errors import BridgeClosedError, EngineStartError, LMBridgeError, RequestTimeoutError

logger = logging.getLogger("lmbridge")

NEWS = 10.0  # seconds between log lines while a load goes on


def load(name: str, bridge: Bridge) -> None:
    """Start loading the model of that name, and return at once."""
    logger.info("Loading the model %s in process %d", name, os.getpid())
    with contextlib.suppress(LMBridgeError):  # not ready yet; the thread gets any other error again
        bridge.start(timeout=0)
    threading.Thread(target=_tell, args=(name, bridge), name="lmbridge loading", daemon=True).start()


def _tell(name: str, bridge: Bridge) -> None:
    began = time.monotonic()
    while True:
        try:
            bridge.start(NEWS)
            break
        except RequestTimeoutError:
            why = bridge.health().reason
            logger.info("Still loading %s after %.0f s%s", name, time.monotonic() - began, f": {why}" if why else "")
        except (EngineStartError, BridgeClosedError):  # the bridge logs the first; the second needs no log line
            return
        except LMBridgeError as error:
            logger.error("Loading the model %s failed: %s", name, error)
            return
    logger.info("%s is ready after %.1f s: %s", name, time.monotonic() - began, bridge.describe())


class _Console(logging.Handler):
    """Logs like Flask, as long as the app has not configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*logging.getLogger().handlers, *logger.handlers]
        if others == [self]:
            default_handler.handle(record)


_console = _Console()


def show_in_console() -> None:
    """Show our INFO lines if the app has not configured logging, as Werkzeug does with its own.

    Loading may take minutes, and by default Python shows only warnings: the app would seem dead.
    """
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        logger.addHandler(_console)
        logger.setLevel(logging.INFO)
