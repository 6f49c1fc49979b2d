"""Calls that a state machine makes: in every way there is, each with a thread or a task of its own.

Rule: nothing here blocks the machine's own thread; what a call has come to is told by ``Asked.end``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from lmbridge import Bridge, Client, Response, ResponseFuture, Stream
from tests.conftest import until

PATIENCE = 60.0  # seconds after which whoever was left standing by the machine gives up, which fails it
Asker = Bridge | Client


class Asked:
    """One call.

    Attributes:
        prompts: one, or those of a list.
        name: the request's id; for a list ``-0``, ``-1`` … are put behind it.
        may: the errors it may end with, besides its own answers.
        end: its texts, an error in the place of each that failed, or the error of all.
        deadline: monotonic time, or None.
        door: it stands in front of the gate until this is set.
    """

    def __init__(
        self, way: str, prompts: list[str], name: str, timeout: float | None, may: set[type[BaseException]]
    ) -> None:
        self.way = way
        self.prompts = prompts
        self.name = name
        self.asker: str | None = None  # the client it was made through, where that is not the bridge's own
        self.is_task = False
        self.may = may
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.end: Future[list[Any]]
        self.door = threading.Event()
        self.door.set()
        self.due = False  # it has to end without anybody's doing
        self.left = False  # its reader leaves after the next delta
        self.hurried = False  # it reads on without pause
        self.pausing = threading.Event()  # its reader has a delta, and waits to be told to go on
        self.go_on = threading.Event()
        self.future: ResponseFuture | None = None  # written by the call's own thread, as are the next two
        self.stream: Stream | None = None
        self.called = 0  # how often the callback of its future ran

    def __repr__(self) -> str:
        return f"{self.name} ({self.way})"

    @property
    def held(self) -> bool:
        """Whether it waits for nobody but the machine."""
        return not self.door.is_set() or self.pausing.is_set()

    def is_named(self, request_id: str) -> bool:
        """Whether that is one of its requests."""
        return request_id == self.name or request_id.startswith(f"{self.name}-")

    def hurry(self) -> None:
        """Let it come to its end."""
        self.hurried = True
        self.door.set()
        self.go_on.set()

    def read_on(self) -> None:
        """Let it read one more delta, if it waits to be told so."""
        if self.pausing.is_set():
            self.pausing.clear()
            self.go_on.set()

    def check(self) -> None:
        """See that it has ended with its own answers, or with an error that it may end with."""
        try:
            results = self.end.result(0)
        except BaseException as error:
            results = [error] * len(self.prompts)
        assert len(results) == len(self.prompts)
        for prompt, result in zip(self.prompts, results, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, tuple(self.may)), f"{self!r} ended with {result!r}"
            elif self.left:
                assert prompt.startswith(result)
            else:
                assert result == prompt

    def pause(self) -> None:
        """Wait to be told to go on. The call's own thread."""
        self.go_on.clear()
        self.pausing.set()
        if not self.hurried:
            assert self.go_on.wait(PATIENCE)
        self.pausing.clear()


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run ``function`` on a thread of its own, which keeps nobody from ending."""
    end: Future[Any] = Future()

    def run() -> None:
        try:
            end.set_result(function())
        except BaseException as error:
            end.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return end


def texts(results: list[Any]) -> list[Any]:
    """The texts of what a list of prompts has ended with; errors as they are."""
    return [result.text if isinstance(result, Response) else result for result in results]


# --- the ways of threads ---


def infer(asker: Asker, asked: Asked) -> list[Any]:
    return [asker.infer(asked.prompts[0], timeout=asked.timeout, request_id=asked.name).text]


def infer_list(asker: Asker, asked: Asked) -> list[Any]:
    options: Any = {"timeout": asked.timeout, "request_id": asked.name}
    return texts(asker.infer(asked.prompts, return_exceptions=True, **options))


def stream(asker: Asker, asked: Asked) -> list[Any]:
    """Reads its deltas as it is told to, and leaves when it is told to."""
    asked.stream = asker.stream(asked.prompts[0], timeout=asked.timeout, request_id=asked.name)
    heard = ""
    for delta in asked.stream:
        heard += delta.text
        asked.pause()
        if asked.left:
            break
    return [heard]


def stream_many(asker: Asker, asked: Asked) -> list[Any]:
    with asker.stream_many(asked.prompts, timeout=asked.timeout, request_id=asked.name) as group:
        heard = [""] * len(asked.prompts)
        for index, delta in group:
            heard[index] += delta.text
        ends = texts(group.responses)
    assert [end if isinstance(end, BaseException) else text for end, text in zip(ends, heard, strict=True)] == ends
    return ends


def submit(asker: Asker, asked: Asked, callback: Callable[[ResponseFuture], object] = lambda done: None) -> list[Any]:
    """Has a callback that does as it likes, and one that counts."""
    future = asker.submit(asked.prompts[0], timeout=asked.timeout, request_id=asked.name)

    def count(done: Any) -> None:
        asked.called += 1

    with suppress(SystemExit):  # where it is done already, the callback runs at once, in this thread
        future.add_done_callback(lambda done: callback(future))
    future.add_done_callback(count)
    asked.future = future
    return [future.result(PATIENCE).text]


def leave_by_exit(future: ResponseFuture) -> None:
    raise SystemExit("from a callback")


def fail(future: ResponseFuture) -> None:
    raise ValueError("from a callback")


def cancel_again(future: ResponseFuture) -> None:
    future.cancel()


WAYS: dict[str, Callable[[Asker, Asked], list[Any]]] = {
    "infer": infer,
    "infer list": infer_list,
    "stream": stream,
    "stream_many": stream_many,
    "submit": submit,
    "submit, exits": lambda asker, asked: submit(asker, asked, leave_by_exit),
    "submit, raises": lambda asker, asked: submit(asker, asked, fail),
    "submit, cancels": lambda asker, asked: submit(asker, asked, cancel_again),
}

# --- the ways of tasks ---


async def ainfer(asker: Asker, asked: Asked) -> list[Any]:
    return [(await asker.ainfer(asked.prompts[0], timeout=asked.timeout, request_id=asked.name)).text]


async def ainfer_list(asker: Asker, asked: Asked) -> list[Any]:
    options: Any = {"timeout": asked.timeout, "request_id": asked.name}
    return texts(await asker.ainfer(asked.prompts, return_exceptions=True, **options))


async def astream(asker: Asker, asked: Asked) -> list[Any]:
    made = asker.astream(asked.prompts[0], timeout=asked.timeout, request_id=asked.name)
    return ["".join([delta.text async for delta in made])]


TASK_WAYS: dict[str, Callable[[Asker, Asked], Awaitable[list[Any]]]] = {
    "ainfer": ainfer,
    "ainfer list": ainfer_list,
    "astream": astream,
}
LISTS = ("infer list", "stream_many", "ainfer list")


class OtherLoop:
    """Somebody else's event loop, on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, way: str, asker: Asker, asked: Asked) -> Future[list[Any]]:
        """Ask in a task."""

        async def ask() -> list[Any]:
            return await TASK_WAYS[way](asker, asked)

        asked.is_task = True
        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    def close(self) -> None:
        """End it once its tasks have ended.

        Raises:
            TimeoutError: one does not end.
        """
        until(lambda: not asyncio.all_tasks(self._loop))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
