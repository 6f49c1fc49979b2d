"""Engines for replicas that say in which process they run, and tell by files what happens to their requests.

Rule: imported by replicas, so nothing of pytest is known here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from lmbridge import Delta, Engine, Request
from lmbridge.testing import ScriptedEncoder

STEP = 0.02
"""Seconds between two words."""


class Telling(Engine):
    """Says its process's id, word for word.

    In the folder that is its model it writes ``<prompt>.begun`` with the id, and ``<prompt>.ended`` with how that came
    about. While there is a file ``hold`` it says nothing, and once there is ``enough``, no more.
    """

    name = "telling"

    def __init__(self, model: str, *, max_batch_size: int = 4) -> None:
        self.max_batch_size = max_batch_size
        self._folder = Path(model)

    async def start(self) -> None:
        if (self._folder / "broken").exists():
            raise LookupError("no such model on this machine")

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        name, end = str(request.prompt), "answered"
        (self._folder / f"{name}.begun").write_text(str(os.getpid()))
        try:
            while (self._folder / "hold").exists():
                await asyncio.sleep(STEP)
            if name == "fatal":
                os._exit(1)
            for _ in range(request.config.max_new_tokens):
                yield Delta(f"{os.getpid()} ")
                await asyncio.sleep(STEP)
                if (self._folder / "enough").exists():
                    break
            yield Delta(finish_reason="length")
        except BaseException as ended:
            end = type(ended).__name__
            raise
        finally:
            (self._folder / f"{name}.ended").write_text(end)


def encoder(model: str, **options: Any) -> ScriptedEncoder:
    """An encoder without a model."""
    return ScriptedEncoder(**options)
