"""Run by tests in a process of its own: the command line with engines that load nothing.

``gated`` loads until somebody has written to the pipe named by its option ``gate``; it answers "count 20" with twenty
tokens, one every ``step_time`` seconds. ``broken`` cannot be loaded. ``encoder``, in the place of the real one, takes
models whose names begin with "rank" for rerankers, and others for embedding models.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lmbridge import EngineStartError, Request
from lmbridge.cli import main
from lmbridge.engines import ENGINES
from lmbridge.engines.thread import EngineThread
from lmbridge.testing import ScriptedEncoder, ScriptedEngine, prompt_text


def count(request: Request) -> list[str]:
    """As many tokens as the prompt says, or its words."""
    text = prompt_text(request.prompt)
    first, _, number = text.partition(" ")
    return [f"{n} " for n in range(int(number))] if first == "count" else [f"{word} " for word in text.split()]


class GatedEngine(ScriptedEngine):
    """Any model's name will do."""

    def __init__(self, model: str, gate: str = "", step_time: float = 0.0) -> None:
        super().__init__(count, step_time=step_time)
        self._gate = gate

    async def start(self) -> None:
        if self._gate:
            await EngineThread("gate").run(Path(self._gate).read_bytes)
        await super().start()


class BrokenEngine(ScriptedEngine):
    """Fails while it loads."""

    def __init__(self, model: str) -> None:
        super().__init__(start_error=RuntimeError("no such weights"))


class Encoder(ScriptedEncoder):
    """Any model's name will do, and says what it is."""

    def __init__(self, model: str, *, task: str = "auto", max_batch_size: int = 64) -> None:
        ranks = Path(model).name.startswith("rank")
        mismatch = (
            EngineStartError(f"{model} has no weights for reranking.") if task == "rerank" and not ranks else None
        )
        super().__init__(tasks=["rerank" if ranks else "embed"], start_error=mismatch, max_batch_size=max_batch_size)


if __name__ == "__main__":
    sys.modules["served"] = sys.modules["__main__"]
    ENGINES["gated"] = ("served", "GatedEngine")
    ENGINES["broken"] = ("served", "BrokenEngine")
    ENGINES["encoder"] = ("served", "Encoder")
    sys.exit(main())
