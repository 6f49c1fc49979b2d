"""The border to an engine: it is built, started and closed here, and what it says is looked at, whatever that is.

Rule: server thread only. What an engine raises leaves here as an ordinary exception: a library that calls ``exit()``
must not end the server thread, and a CancelledError of the engine's own must not pass for ours.
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
    """A new engine.

    Raises:
        Exception: whatever the factory raised; RuntimeError where it was no Exception, or where the engine's name did.
    """
    try:
        engine = factory()
    except Exception:
        raise
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised while the engine was built") from cause
    around = engine if isinstance(engine, Engine) else engine_around(engine, {})
    if around is None:
        raise TypeError(f"the factory built no Engine but {reprlib.repr(engine)}")
    try:
        str(around.name)  # as messages about it do, from anywhere
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its name") from cause
    return around


def name_of(engine: Engine) -> str:
    """What to call an engine in messages, whatever its ``name`` does."""
    try:
        return str(engine.name)
    except BaseException:  # it is asked for when things go wrong, by threads that must not end
        return type(engine).__name__


def furnish(engine: Engine, **given: object) -> None:
    """Set attributes of an engine.

    Raises:
        RuntimeError: it does not take one of them.
    """
    for name, value in given.items():
        try:
            setattr(engine, name, value)
        except BaseException as cause:
            raise RuntimeError(f"{shown(cause)} was raised as its {name} was set") from cause


def device_said(engine: Engine, otherwise: object = None) -> object:
    """The ``device`` of an engine, as it is there; ``otherwise`` of one that has none.

    Raises:
        RuntimeError: it raised something.
    """
    try:
        return getattr(engine, "device", otherwise)
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its device") from cause


def batch_size(engine: Engine) -> int:
    """How many requests an engine that has started works on at once.

    Raises:
        Exception: it does not say so.
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
    """See that an engine that has started says what it does.

    Raises:
        Exception: it does not.
    """
    try:
        said = engine.tasks
        known = not isinstance(said, str) and bool(said) and all(task in _DOES for task in said)
    except BaseException as cause:
        raise RuntimeError(f"{shown(cause)} was raised by its tasks") from cause
    if not known:
        wanted = ", ".join(map(repr, _DOES))
        raise TypeError(f"tasks of the engine {name_of(engine)} must be a set of some of {wanted}, not {shown(said)}")


_DOES: dict[Task, str] = {
    "generate": "generate text (infer, stream)",
    "embed": "embed",
    "rerank": "rerank",
    "call": "call a function (call, map)",
}
_WANTS: dict[Task, str] = {
    "generate": "a language model; of a function, one with task='generate'",
    "embed": "an embedding model (engine='encoder'; --embed on the command line)",
    "rerank": "a reranking model (engine='encoder', with task='rerank'; --rerank on the command line)",
    "call": "Bridge(function_engine(your_function))",
}


def check_task(engine: Engine, request: Request) -> None:
    """Refuse what the engine does not do at all.

    Raises:
        UnsupportedTaskError: it does something else.
    """
    task = request.task
    if task in engine.tasks:
        return
    does = " and ".join(_DOES.get(name, name) for name in sorted(engine.tasks))
    use = getattr(engine, "instead", _WANTS).get(task, _WANTS[task])  # an engine may know better
    raise UnsupportedTaskError(
        f"The engine {name_of(engine)!r} cannot {_DOES[task]}; it can {does or 'do nothing'}. Use {use}."
    )


MOST_TOKENS = 2**53
"""What no engine has counted; more would not go into metrics, whose numbers are floats."""
_REASONS: tuple[object, ...] = get_args(FinishReason)


def flaw(delta: Delta) -> str | None:
    """What is wrong with what an engine said; None when nothing is."""
    if not isinstance(delta, Delta):
        return f"{shown(delta)} where a Delta belongs"
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
    ("text", lambda value: isinstance(value, str), "which is no string"),
    ("token_ids", lambda value: isinstance(value, list), "which are no list"),
    ("logprobs", lambda value: value is None or isinstance(value, list), "which are no list"),
    ("error", lambda value: value is None or isinstance(value, BaseException), "which is no exception"),
    ("finish_reason", lambda value: value is None or value in _REASONS, "which is none"),
    ("reasoning", lambda value: isinstance(value, str), "which is no string"),
    ("tool_calls", _are_calls, "which are no list of such"),
    ("usage", _is_usage, "which counts no tokens"),
)
"""Field of a Delta, what is right for it, and what is said of a value that is not."""


def as_own(error: BaseException, call: Call) -> LMBridgeError:
    """An engine's error as this call's: another instance where the engine has said the same one of another call."""
    if isinstance(error, LMBridgeError):
        with contextlib.suppress(Exception):  # there may be one that takes no attributes
            own = error if error.request_id in (None, call.request.id) else fresh(error)
            own.request_id, own.partial = call.request.id, ""
            return own
    return engine_error(f"The engine failed this request: {shown(error)}.", error)


def start_engine(engine: Engine) -> asyncio.Task[None]:
    """The task in which an engine starts; ``failure`` says how that went."""
    return _own_task(engine.start, f"the engine {name_of(engine)} started")


async def close_engine(engine: Engine, seconds: float) -> None:
    """Close an engine, which is left behind when that takes longer than so many seconds. Raises nothing."""
    closing = _own_task(engine.close, f"the engine {name_of(engine)} closed")
    await asyncio.wait([closing], timeout=seconds)
    if not closing.done():
        closing.cancel()
        logger.warning("The engine %s did not close within %.0f s; it is left behind.", name_of(engine), seconds)
    elif (error := failure(closing)) is not None:
        logger.error("The engine %s failed while closing: %s", name_of(engine), shown(error), exc_info=error)


def failure(task: asyncio.Task[None]) -> Exception | None:
    """What a task that is done has failed of; None when it did not."""
    if task.cancelled():
        return RuntimeError("it was cancelled")
    error = task.exception()
    return error if error is None or isinstance(error, Exception) else RuntimeError(f"{shown(error)} was raised")


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
        raise RuntimeError(f"{shown(cause)} was raised while {moment}") from cause
