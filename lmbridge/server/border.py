"""The boundary to an engine: builds, starts and closes it, and validates all its output.

Rule: server thread only. Whatever an engine raises leaves here as an ordinary exception: a library calling ``exit()``
must not end the server thread, and an engine's own CancelledError must not pass for ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import reprlib
from collections.abc import Awaitable, Callable
from typing import Any, get_args

from lmbridge.crossing.call import Call
from lmbridge.engines import EngineFactory, engine_around
from lmbridge.engines.base import Engine, engine_error
from lmbridge.errors import LMBridgeError, UnsupportedTaskError, fresh
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, FinishReason, Request, Task, ToolCall, Usage
from lmbridge.values import as_int


def build_engine(factory: EngineFactory) -> Engine:
    """Build a new engine.

    Raises:
        Exception: whatever the factory raised; RuntimeError if that was no Exception, or if reading ``name`` failed.
    """
    try:
        engine = factory()
    except Exception:
        raise
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised while building the engine") from cause
    around = engine if isinstance(engine, Engine) else engine_around(engine, {})
    if around is None:
        raise TypeError(f"the factory must return an Engine, not {reprlib.repr(engine)}")
    try:
        str(around.name)  # messages read it later, on any thread
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its name") from cause
    return around


def name_of(engine: Engine) -> str:
    """The engine's name for messages, whatever its ``name`` does."""
    try:
        return str(engine.name)
    except BaseException:  # read during failures, by threads that must not end
        return type(engine).__name__


def furnish(engine: Engine, **given: object) -> None:
    """Set attributes of an engine.

    Raises:
        RuntimeError: setting one of them failed.
    """
    for name, value in given.items():
        try:
            setattr(engine, name, value)
        except BaseException as cause:
            raise RuntimeError(f"{shown(cause)} was raised while setting its {name}") from cause


def device_said(engine: Engine, otherwise: object = None) -> object:
    """The engine's ``device`` as it is, or ``otherwise`` if it has none.

    Raises:
        RuntimeError: reading it failed.
    """
    try:
        return getattr(engine, "device", otherwise)
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its device") from cause


def batch_size(engine: Engine) -> int:
    """How many requests a started engine works on at once.

    Raises:
        Exception: the value is invalid.
    """
    try:
        said = engine.max_batch_size
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its max_batch_size") from cause
    size = as_int(said)
    if size is None or size < 1:
        raise TypeError(f"max_batch_size of the engine {name_of(engine)} must be an int >= 1, not {shown(said)}")
    return size


def check_tasks(engine: Engine) -> None:
    """Check the tasks of a started engine.

    Raises:
        Exception: they are invalid.
    """
    try:
        said = engine.tasks
        known = not isinstance(said, str) and bool(said) and all(task in _DOES for task in said)
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its tasks") from cause
    if not known:
        wanted = ", ".join(map(repr, _DOES))
        raise TypeError(f"tasks of the engine {name_of(engine)} must be a set from {wanted}, not {shown(said)}")


_DOES: dict[Task, str] = {
    "generate": "generate text (infer, stream)",
    "embed": "embed",
    "rerank": "rerank",
    "call": "call a function (call, map)",
}
_WANTS: dict[Task, str] = {
    "generate": "a language model, or a function with task='generate'",
    "embed": "an embedding model (engine='encoder'; --embed on the command line)",
    "rerank": "a reranking model (engine='encoder', with task='rerank'; --rerank on the command line)",
    "call": "Bridge(function_engine(your_function))",
}


def check_task(engine: Engine, request: Request) -> None:
    """Refuse a request whose task the engine does not support.

    Raises:
        UnsupportedTaskError: the engine does other tasks.
    """
    task = request.task
    if task in engine.tasks:
        return
    does = " and ".join(_DOES.get(name, name) for name in sorted(engine.tasks))
    use = getattr(engine, "instead", _WANTS).get(task, _WANTS[task])  # an engine may suggest something else
    raise UnsupportedTaskError(
        f"The engine {name_of(engine)!r} cannot {_DOES[task]}; it can {does or 'do nothing'}. Use {use}."
    )


MOST_TOKENS = 2**53
"""Above any real count; larger numbers would not fit into the metrics' floats."""
_REASONS: tuple[object, ...] = get_args(FinishReason)


def flaw(delta: Delta) -> str | None:
    """What is invalid in an engine's delta; None if nothing is."""
    if not isinstance(delta, Delta):
        return f"{shown(delta)} instead of a Delta"
    for field, is_right, wrong in _CHECKS:
        value = getattr(delta, field)
        if not is_right(value):
            return f"the {field} {shown(value)}, {wrong}"
    return None


def _is_usage(value: object) -> bool:
    return value is None or (isinstance(value, Usage) and _counts(value.prompt_tokens, value.completion_tokens))


def _are_calls(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(piece, ToolCall) for piece in value)


def _counts(*numbers: object) -> bool:
    counts = [as_int(number) for number in numbers]
    return all(count is not None and 0 <= count < MOST_TOKENS for count in counts)


_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("text", lambda value: isinstance(value, str), "which is not a string"),
    ("token_ids", lambda value: isinstance(value, list), "which is not a list"),
    ("logprobs", lambda value: value is None or isinstance(value, list), "which is not a list"),
    ("error", lambda value: value is None or isinstance(value, BaseException), "which is not an exception"),
    ("finish_reason", lambda value: value is None or value in _REASONS, "which is not a finish reason"),
    ("reasoning", lambda value: isinstance(value, str), "which is not a string"),
    ("tool_calls", _are_calls, "which is not a list of ToolCalls"),
    ("usage", _is_usage, "which is not a valid Usage"),
)
"""A Delta's fields, the check for each, and the message for an invalid value."""


def as_own(error: BaseException, call: Call) -> LMBridgeError:
    """An engine's error as this call's own: a copy if the engine gave the same instance to several calls."""
    if isinstance(error, LMBridgeError):
        with contextlib.suppress(Exception):  # some exceptions take no attributes
            own = error if error.request_id in (None, call.request.id) else fresh(error)
            own.request_id, own.partial = call.request.id, ""
            return own
    return engine_error(f"The engine failed this request: {shown(error)}.", error)


def start_engine(engine: Engine) -> asyncio.Task[None]:
    """The task in which an engine starts; ``failure`` returns its error."""
    return _own_task(engine.start, f"starting the engine {name_of(engine)}")


async def close_engine(engine: Engine, seconds: float) -> None:
    """Close an engine, or leave it behind after ``seconds``. Never raises."""
    closing = _own_task(engine.close, f"closing the engine {name_of(engine)}")
    await asyncio.wait([closing], timeout=seconds)
    if not closing.done():
        closing.cancel()
        logger.warning("The engine %s did not close within %.0f s; it was left behind.", name_of(engine), seconds)
    elif (error := failure(closing)) is not None:
        logger.error("The engine %s failed while closing: %s", name_of(engine), shown(error), exc_info=error)


def failure(task: asyncio.Task[None]) -> Exception | None:
    """The error of a finished task; None if it succeeded."""
    if task.cancelled():
        return RuntimeError("it was cancelled")
    error = task.exception()
    return error if error is None or isinstance(error, Exception) else RuntimeError(f"{shown(error)} was raised")


def _own_task(work: Callable[[], Awaitable[None]], moment: str) -> asyncio.Task[None]:
    """A task for engine code, which the engine may cancel without affecting others."""
    task = asyncio.ensure_future(_tame(work, moment))
    task.add_done_callback(failure)  # so that asyncio does not warn about an unretrieved exception
    return task


async def _tame(work: Callable[[], Awaitable[None]], moment: str) -> None:
    try:
        await work()
    except (Exception, GeneratorExit):
        raise
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised while {moment}") from cause
