"""Loads a model in the background, and logs how that goes.

Rule: each load has a thread of its own here, which waits for the bridge and writes to the log; nobody waits for it.
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

NEWS = 10.0  # seconds after which a load that takes long is told of again


def load(name: str, bridge: Bridge) -> None:
    """Start loading the model of that name, and return at once."""
    logger.info("Loading the model %s in process %d", name, os.getpid())
    with contextlib.suppress(LMBridgeError):  # it is not ready at once; the thread meets any other error again
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
        except (EngineStartError, BridgeClosedError):  # the bridge logs the first; for the second, nobody waits
            return
        except LMBridgeError as error:
            logger.error("The model %s cannot be loaded: %s", name, error)
            return
    logger.info("%s is ready after %.1f s: %s", name, time.monotonic() - began, bridge.describe())


class _Console(logging.Handler):
    """Writes as Flask does, as long as nobody has configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*logging.getLogger().handlers, *logger.handlers]
        if others == [self]:
            default_handler.handle(record)


_console = _Console()


def show_in_console() -> None:
    """Show our INFO lines where nobody has configured logging, as Werkzeug does with its own when it serves.

    Loading may take minutes, and by default Python shows warnings only: whoever waits would take the app for dead.
    """
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        logger.addHandler(_console)
        logger.setLevel(logging.INFO)
