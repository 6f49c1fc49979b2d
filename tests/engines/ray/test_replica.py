"""A replica by itself, in this process: it knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from lmbridge import Delta, InvalidRequestError
from lmbridge.engines.ray.errand import Errand
from lmbridge.messages import Apply, Embed, Job, Rerank
from lmbridge.replica import Replica
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from lmbridge.testing.scripted_encoder import score_of, vector_of
from tests.conftest import until_then


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test of pytest's whose body is a coroutine's."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


@contextlib.asynccontextmanager
async def replica(engine: Any) -> AsyncIterator[Replica]:
    """A replica that serves, and is closed in the end as Serve does it."""
    made = Replica("", engine, places=8, options={})
    try:
        yield made
    finally:
        made.__del__()


def errand(prompt: str = "", job: Job | None = None, **config: Any) -> Errand:
    return Errand(prompt, job, {"timeout": 30.0}, config)


@on_a_loop
async def test_many_streams_say_more_at_once() -> None:
    """Each delta costs the process that asks: with all of them apart, it would be what limits a cluster."""
    words = " ".join(f"w{number}" for number in range(200))
    async with replica(lambda model: ScriptedEngine(step_time=0.001)) as one:
        answers = await asyncio.gather(*(_all(one, errand(words)) for _ in range(32)))
    for deltas in answers:
        assert "".join(delta.text for delta in deltas) == words
        assert len(deltas) < 100
        assert deltas[-1].finish_reason == "stop"


@on_a_loop
async def test_leaving_it_stops_the_engine() -> None:
    """Serve cancels what was cancelled, and nothing else tells the engine."""
    engine = ScriptedEngine(step_time=0.01)
    async with replica(lambda model: engine) as one:
        task = asyncio.create_task(_all(one, errand("word " * 10_000)))
        await until_then(lambda: engine.steps > 3)
        task.cancel()
        await asyncio.wait([task])
        await until_then(lambda: engine.aborted and not engine.active)


@on_a_loop
async def test_an_error_is_the_last_delta() -> None:
    """What is raised would come over in Ray's own errors, and its class be lost."""
    async with replica(lambda model: ScriptedEngine()) as one:
        (delta,) = await _all(one, errand("x", no_such_field=1))
    assert isinstance(delta.error, InvalidRequestError)


@on_a_loop
async def test_it_does_what_its_engine_does() -> None:
    """An encoder's replica serves vectors and scores."""
    async with replica(lambda model: ScriptedEncoder()) as one:
        (vector,) = await _all(one, errand(job=Embed("a text", normalize=True)))
        assert vector.value == pytest.approx(vector_of("a text"))
        (score,) = await _all(one, errand(job=Rerank("a query", "a document")))
        assert score.value == pytest.approx(score_of("a query", "a document"))
        (refused,) = await _all(one, errand(job=Apply(3)))
        assert "cannot call a function" in str(refused.error)


@on_a_loop
async def test_a_replica_that_serves_no_more_says_so() -> None:
    """Serve replaces the ones that do."""
    async with replica(lambda model: ScriptedEngine()) as one:
        one.check_health()
    with pytest.raises(RuntimeError, match="closed"):
        one.check_health()


async def _all(one: Replica, asked: Errand) -> list[Delta]:
    return [delta async for delta in one.generate(asked)]
