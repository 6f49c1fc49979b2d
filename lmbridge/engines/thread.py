"""An engine's own thread, for blocking calls.

Rule: ``EngineThread.run`` is called on the server thread; the function runs on a separate thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

from lmbridge.log import logger, shown

LOOK_INTERVAL = 1.0
"""Seconds between checks that an engine's thread is alive, while a result is awaited."""

T = TypeVar("T")

_here = threading.local()


def loop_behind() -> int | None:
    """The ident of the thread whose loop awaits this engine thread; None on any other thread."""
    ident: int | None = getattr(_here, "loop", None)
    return ident


@contextlib.contextmanager
def giving_way(end: Callable[[], object]) -> Iterator[None]:
    """Within this block on an engine's thread, call ``end`` before the thread waits for anything else."""
    _here.end = end
    try:
        yield
    finally:
        _here.end = None


def give_way() -> None:
    """Called before this thread waits, for another bridge say: releases its turn on the device."""
    end: Callable[[], object] | None = getattr(_here, "end", None)
    if end is not None:
        end()


class EngineThread:
    """The one worker thread of an engine: blocking calls run there in order, while the loop goes on.

    It is our own daemon thread rather than an executor: the interpreter joins executor threads before atexit runs, so a
    model stuck in native code would hang the process.

    If the thread ends, because an exception was thrown into it say, another continues with what waits. The interrupted
    call fails; it is not retried.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Appended on the server thread. The worker peeks at the first and pops it when done.
        self._jobs: deque[_Job[Any]] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # rung by any thread: there is work
        self._closed = False  # set by any thread, once
        self._thread: threading.Thread | None = None  # server thread only
        self._loop = 0  # ident of the server thread, once it has submitted work

    async def run(self, function: Callable[..., T], *args: Any, while_awaited: bool = False) -> T:
        """Run ``function(*args)`` on the thread and await what it returns or raises.

        Args:
            while_awaited: do not begin if the awaiting task was cancelled.

        Raises:
            RuntimeError: the thread was closed, ended meanwhile, or cannot be started; or the function tried to end it,
                with SystemExit say, which is chained.
        """
        if self._closed:
            raise RuntimeError(f"The thread {self._name!r} is closed and takes no more work.")
        self._loop = threading.get_ident()
        self._see_to_thread()
        job = _Job(functools.partial(function, *args))
        self._jobs.append(job)
        self._bell.put(None)
        try:
            while job.outcome is None:
                await asyncio.wait([job.news], timeout=LOOK_INTERVAL)
                if job.outcome is None:
                    self._see_to_thread()
        except asyncio.CancelledError:
            job.unwanted = while_awaited
            raise
        return job.result()

    def close(self) -> None:
        """Let the thread end after its queued jobs. Any thread; takes no lock."""
        self._closed = True
        self._bell.put(None)

    def _see_to_thread(self) -> None:
        """Start the thread, or replace one that has ended."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self._thread is not None:
            logger.error("The thread %r has ended and is being replaced.", self._name)
        if self._jobs and self._jobs[0].begun:
            self._jobs.popleft().lose(f"The thread {self._name!r} ended in the middle of a call and was replaced.")
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        thread.start()
        self._thread = thread  # only once it runs: nothing may wait for one that does not

    def _work(self) -> None:
        _here.loop = self._loop
        while True:
            while self._jobs:
                self._jobs[0].do()
                self._jobs.popleft()
            if self._closed:
                return
            self._bell.get()


class _Job(Generic[T]):
    """One call for an engine's thread, and its outcome."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.news: asyncio.Future[None] = self._loop.create_future()  # loop's thread only
        self.unwanted = False  # nobody is waiting: it need not begin; set by the loop's thread
        self.begun = False  # set by the worker thread, read when that has ended
        self.outcome: tuple[T | None, BaseException | None] | None = None  # set once, by the worker or its successor

    def do(self) -> None:
        """Make the call, unless it is unwanted. Worker thread."""
        if self.unwanted:
            return
        self.begun = True
        try:
            self.outcome = self._call(), None
        except Exception as raised:
            self.outcome = None, raised
        except BaseException as raised:  # some libraries call exit() when they cannot load
            self.lose(f"{shown(raised)} on the engine's thread", raised)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is waiting
            self._loop.call_soon_threadsafe(self._wake)

    def lose(self, why: str, cause: BaseException | None = None) -> None:
        """Fail the call, unless it has an outcome."""
        if self.outcome is None:
            error = RuntimeError(why)
            error.__cause__ = cause
            self.outcome = None, error

    def result(self) -> T:
        """What the call returned or raised."""
        assert self.outcome is not None
        result, error = self.outcome
        try:
            if error is not None:
                raise error
            return cast(T, result)
        finally:  # frees what the error's traceback holds, such as half a model, at once
            self.outcome = None
            del error

    def _wake(self) -> None:
        if not self.news.done():  # its waiter was cancelled
            self.news.set_result(None)
