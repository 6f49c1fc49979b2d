"""The ways from N threads to a function on one event loop that people use, each as small as it can be written.

Each is a context manager that gives ``ask(prompt) -> answer``, to be called from any number of threads at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import janus
from anyio.from_thread import start_blocking_portal
from asgiref.sync import async_to_sync

from lmbridge import Bridge, Delta, Engine, Request, Usage
from lmbridge.engines.base import Sink

LIMIT = 30.0  # seconds; the deadline of each call
ANSWER = "answer"
Ask = Callable[[str], str]


async def answer(prompt: str) -> str:
    """The function on the loop."""
    return ANSWER


class InstantEngine(Engine):
    """The same for the bridge: answers while it is asked."""

    name = "instant"
    max_batch_size = 1024

    async def start(self) -> None:
        pass

    def add_request(self, request: Request, sink: Sink) -> None:
        sink(Delta(ANSWER, [1], finish_reason="stop", usage=Usage(1, 1)))


@contextlib.contextmanager
def bridge() -> Iterator[Ask]:
    """``bridge.infer`` of a bridge with its defaults, a deadline set."""
    with Bridge(InstantEngine) as opened:
        yield lambda prompt: opened.infer(prompt, timeout=LIMIT).text


@contextlib.contextmanager
def loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own; what still runs on it is cancelled at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def threadsafe() -> Iterator[Ask]:
    """``asyncio.run_coroutine_threadsafe(...).result()``"""
    with loop_thread() as loop:
        yield lambda prompt: asyncio.run_coroutine_threadsafe(answer(prompt), loop).result(LIMIT)


@contextlib.contextmanager
def anyio_portal() -> Iterator[Ask]:
    """anyio's BlockingPortal."""
    with start_blocking_portal() as portal:
        yield lambda prompt: portal.call(answer, prompt)


@contextlib.contextmanager
def asgiref() -> Iterator[Ask]:
    """asgiref's async_to_sync: a loop of its own for each call, so it cannot even share an engine."""
    yield async_to_sync(answer)


class _Pairs:
    """A pair of queues for each thread, made when it first asks and given to ``serve`` on the loop."""

    def __init__(self, make: Callable[[], Any], start: Callable[[Any], None]) -> None:
        self._make = make
        self._start = start
        self._own = threading.local()

    def get(self) -> Any:
        try:
            return self._own.pair
        except AttributeError:
            pair = self._own.pair = (self._make(), self._make())
            self._start(pair)
            return pair


@contextlib.contextmanager
def polled() -> Iterator[Ask]:
    """LMDeploy's recipe: two queues for each thread, and a task for each that polls with ``sleep(0)``."""

    async def serve(inbox: queue.Queue[str], outbox: queue.Queue[str]) -> None:
        while True:
            if inbox.empty():
                await asyncio.sleep(0)
            else:
                outbox.put(await answer(inbox.get()))

    with loop_thread() as loop:
        pairs = _Pairs(queue.Queue, lambda pair: void(asyncio.run_coroutine_threadsafe(serve(*pair), loop)))

        def ask(prompt: str) -> str:
            inbox, outbox = pairs.get()
            inbox.put(prompt)
            return str(outbox.get(timeout=LIMIT))

        yield ask


@contextlib.contextmanager
def janus_tasks() -> Iterator[Ask]:
    """A pair of janus queues for each thread, and a task for each that awaits the one and answers by the other."""

    async def serve(inbox: janus.Queue[str], outbox: janus.Queue[str]) -> None:
        while True:
            await outbox.async_q.put(await answer(await inbox.async_q.get()))

    with loop_thread() as loop:
        pairs = _Pairs(janus.Queue, lambda pair: void(asyncio.run_coroutine_threadsafe(serve(*pair), loop)))

        def ask(prompt: str) -> str:
            inbox, outbox = pairs.get()
            inbox.sync_q.put(prompt)
            return str(outbox.sync_q.get(timeout=LIMIT))

        yield ask


class _Bell:
    """One wake-up of the loop outstanding, however many threads ring."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.entries: deque[Any] = deque()
        self.rung = False
        self._wake = wake

    def ring(self, entry: object) -> None:
        self.entries.append(entry)
        if not self.rung:
            self.rung = True
            self._wake()

    def take(self) -> Iterator[Any]:
        self.rung = False
        while self.entries:
            yield self.entries.popleft()


@contextlib.contextmanager
def janus_bell() -> Iterator[Ask]:
    """janus pairs as they come, with one doorbell for all, no task, and nothing of what a bridge has to promise."""

    def look() -> None:
        for inbox, outbox in bell.take():
            inbox.async_q.get_nowait()
            outbox.async_q.put_nowait(ANSWER)

    with loop_thread() as loop:
        bell = _Bell(lambda: loop.call_soon_threadsafe(look))
        pairs = _Pairs(janus.Queue, void)

        def ask(prompt: str) -> str:
            pair = pairs.get()
            pair[0].sync_q.put(prompt)
            bell.ring(pair)
            return str(pair[1].sync_q.get(timeout=LIMIT))

        yield ask


@contextlib.contextmanager
def bare() -> Iterator[Ask]:
    """A deque in, a SimpleQueue out, an eventfd to wake the loop: no janus and no promise, the least there can be."""
    wake_up = os.eventfd(0, os.EFD_NONBLOCK)

    def look() -> None:
        os.eventfd_read(wake_up)
        for outbox in bell.take():
            outbox.put(ANSWER)

    with loop_thread() as loop:
        bell = _Bell(functools.partial(os.eventfd_write, wake_up, 1))
        own = threading.local()
        loop.call_soon_threadsafe(loop.add_reader, wake_up, look)

        def ask(prompt: str) -> str:
            if not hasattr(own, "outbox"):
                own.outbox = queue.SimpleQueue()
            bell.ring(own.outbox)
            return str(own.outbox.get(timeout=LIMIT))

        yield ask
        loop.call_soon_threadsafe(loop.remove_reader, wake_up)
    os.close(wake_up)


def void(_: object) -> None:
    """Drop a result."""


PEERS = {
    "bridge": bridge,
    "threadsafe": threadsafe,
    "anyio portal": anyio_portal,
    "asgiref": asgiref,
    "polled": polled,
    "janus tasks": janus_tasks,
    "janus bell": janus_bell,
    "bare": bare,
}
