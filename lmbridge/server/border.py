"""The border to an engine's life: it is built, started and closed here, whatever comes out of its code.

Rule: server thread only. What an engine raises leaves here as an ordinary exception: a library that calls ``exit()``
must not end the server thread, and a CancelledError of the engine's own must not pass for ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lmbridge.engines import EngineFactory
from lmbridge.engines.base import Engine

logger = logging.getLogger("lmbridge")


def build_engine(factory: EngineFactory) -> Engine:
    """A new engine.

    Raises:
        Exception: whatever the factory raised.
    """
    try:
        engine = factory()
    except Exception:
        raise
    except BaseException as cause:
        raise RuntimeError(f"{cause!r} was raised while the engine was built") from cause
    if not isinstance(engine, Engine):
        raise TypeError(f"the factory built no Engine but {engine!r}")
    return engine


def start_engine(engine: Engine) -> asyncio.Task[None]:
    """The task in which an engine starts; ``failure`` says how that went."""
    return _own_task(engine.start, f"the engine {engine.name} started")


async def close_engine(engine: Engine, seconds: float) -> None:
    """Close an engine, which is left behind when that takes longer than so many seconds. Raises nothing."""
    closing = _own_task(engine.close, f"the engine {engine.name} closed")
    await asyncio.wait([closing], timeout=seconds)
    if not closing.done():
        closing.cancel()
        logger.warning("The engine %s did not close within %.0f s; it is left behind.", engine.name, seconds)
    elif (error := failure(closing)) is not None:
        logger.error("The engine %s failed while closing: %r", engine.name, error, exc_info=error)


def failure(task: asyncio.Task[None]) -> Exception | None:
    """What a task that is done has failed of; None when it did not."""
    if task.cancelled():
        return RuntimeError("it was cancelled")
    error = task.exception()
    return error if error is None or isinstance(error, Exception) else RuntimeError(f"{error!r} was raised")


def _own_task(work: Callable[[], Awaitable[None]], moment: str) -> asyncio.Task[None]:
    """A task for what an engine does, which the engine may cancel and nobody else depends on."""
    task = asyncio.ensure_future(_tame(work, moment))
    task.add_done_callback(failure)  # so that asyncio does not complain of one that nobody asks any more
    return task


async def _tame(work: Callable[[], Awaitable[None]], moment: str) -> None:
    try:
        await work()
    except (Exception, GeneratorExit):
        raise
    except BaseException as cause:
        raise RuntimeError(f"{cause!r} was raised while {moment}") from cause
