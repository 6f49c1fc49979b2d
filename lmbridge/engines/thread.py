"""An engine's own thread, for what blocks.

Rule: ``EngineThread.run`` is called on the server thread; what it is given runs on a thread of its own.
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
"""Seconds between two looks at whether an engine's thread still lives, while something is awaited from it."""

T = TypeVar("T")

_here = threading.local()


def loop_behind() -> int | None:
    """The ident of the thread whose loop waits for what this thread is at; None where this is no engine's thread."""
    ident: int | None = getattr(_here, "loop", None)
    return ident


@contextlib.contextmanager
def giving_way(end: Callable[[], object]) -> Iterator[None]:
    """Have ``end`` called, in this block on an engine's thread, before that waits for somebody else."""
    _here.end = end
    try:
        yield
    finally:
        _here.end = None


def give_way() -> None:
    """This thread is about to wait, for another bridge say: what it holds of a device is for others."""
    end: Callable[[], object] | None = getattr(_here, "end", None)
    if end is not None:
        end()


class EngineThread:
    """The one worker thread of an engine: what blocks runs there in order, while the loop serves on.

    It is a daemon of our own rather than an executor: the interpreter joins executor threads before atexit runs, and a
    model that is stuck in native code would then hold the process.

    Should the thread end, by an exception thrown into it say, another one goes on with what waits. The call that the
    thread was at fails; it is not made twice.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Appended on the server thread. The worker looks at the first, and takes it out when it is through with it.
        self._jobs: deque[_Job[Any]] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # rung by any thread: there is something to look at
        self._closed = False  # set by any thread, once
        self._thread: threading.Thread | None = None  # server thread only
        self._loop = 0  # ident of the server thread, once it has given work

    async def run(self, function: Callable[..., T], *args: Any, while_awaited: bool = False) -> T:
        """Run ``function(*args)`` on the thread and await what it returns or raises.

        Args:
            while_awaited: do not begin once whoever awaits it has been cancelled.

        Raises:
            RuntimeError: the thread was closed before, ended meanwhile, or cannot be started; or the function tried
                to end it, with SystemExit say, which is chained.
        """
        if self._closed:
            raise RuntimeError(f"The thread {self._name!r} has been closed; it takes no more work.")
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
        """Let the thread end after the jobs it has. Any thread; takes no lock."""
        self._closed = True
        self._bell.put(None)

    def _see_to_thread(self) -> None:
        """Start it, or another one in place of one that has ended."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self._thread is not None:
            logger.error("The thread %r has ended, and is replaced.", self._name)
        if self._jobs and self._jobs[0].begun:
            self._jobs.popleft().lose(f"The thread {self._name!r} ended in the middle of a call; it has been replaced.")
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        thread.start()
        self._thread = thread  # not before it runs: one that does not would be waited for

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
    """One call for an engine's thread, and what came of it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.news: asyncio.Future[None] = self._loop.create_future()  # loop's thread only
        self.unwanted = False  # nobody waits any more: it need not begin; set by the loop's thread
        self.begun = False  # set by the worker thread, read when that has ended
        self.outcome: tuple[T | None, BaseException | None] | None = None  # set once, by the worker or its successor

    def do(self) -> None:
        """Make the call, if somebody waits for it. Worker thread."""
        if self.unwanted:
            return
        self.begun = True
        try:
            self.outcome = self._call(), None
        except Exception as raised:
            self.outcome = None, raised
        except BaseException as raised:  # some libraries call exit() when they cannot load
            self.lose(f"{shown(raised)} on the engine's thread", raised)
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile: nobody waits
            self._loop.call_soon_threadsafe(self._wake)

    def lose(self, why: str, cause: BaseException | None = None) -> None:
        """Nothing came of it, unless something did."""
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
        finally:  # what the error's traceback holds, half a model say, would live until the next garbage collection
            self.outcome = None
            del error

    def _wake(self) -> None:
        if not self.news.done():  # its waiter was cancelled
            self.news.set_result(None)
