"""Models for llama.cpp, made once, and a harness that drives an engine on a loop of its own.

Tests here need xllamacpp: ``pip install "lmbridge[llamacpp]"``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.engines.llamacpp import LlamaCppEngine
from lmbridge.messages import Delta, GenerationConfig, Prompt, Request, join_deltas


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def demo(files: Path) -> str:
    """The bundled model."""
    from tests.engines.llamacpp.models import write_demo

    return write_demo(files / "demo.gguf")


@pytest.fixture(scope="session")
def encoder(files: Path) -> str:
    """A random model that makes vectors of up to 64 tokens."""
    from tests.engines.llamacpp.models import write_encoder

    return write_encoder(files / "encoder.gguf")


@pytest.fixture(scope="session")
def reranker(files: Path) -> str:
    """A random model that scores documents."""
    from tests.engines.llamacpp.models import write_encoder

    return write_encoder(files / "reranker.gguf", scores=True)


@pytest.fixture(scope="module")
def bridge(demo: str) -> Iterator[Bridge]:
    with Bridge(demo, engine="llamacpp", threads=1, max_batch_size=4) as bridge:
        yield bridge


class Answer:
    """What one request's sink was told."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ended = asyncio.Event()

    def sink(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish_reason is not None or delta.error is not None:
            self.ended.set()

    async def wait(self) -> Delta:
        """All of it, once it has ended."""
        await asyncio.wait_for(self.ended.wait(), 60)
        return join_deltas(self.deltas)


_numbers = itertools.count()


def request(prompt: Prompt, **config: Any) -> Request:
    return Request(
        id=f"r{next(_numbers)}",
        prompt=prompt,
        config=GenerationConfig().merged(config),  # type: ignore[arg-type]
        raw=False,
        client="test",
        priority=0,
        deadline=None,
        created=time.monotonic(),
        context=contextvars.copy_context(),
    )


@contextlib.asynccontextmanager
async def driven(model: str, **options: Any) -> AsyncIterator[LlamaCppEngine]:
    """A started engine, closed in the end."""
    engine = LlamaCppEngine(model, **{"threads": 1, "max_batch_size": 2, **options})
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()
