"""The table of docs/using/threads.rst is true: each cell is tried by calling the verb there.

Cells that say ``no`` are not called, for what they warn of is a hang at a rare moment; two tests show such a moment.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lmbridge import Bridge, Engine, FunctionEngine
from lmbridge.testing import ScriptedEncoder, ScriptedEngine

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "using" / "threads.rst"
SIGNS = {"WrongThreadError": "W", "ForkedError": "F"}
SECONDS = 20.0


class Bed:
    """A bridge that has started, and what a program may hold of it."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self.bridge = Bridge(engine).start()
        self.client = self.bridge.client()
        if "generate" in self.bridge.tasks():
            self.stream = self.bridge.stream("endless")
            self.ended = self.bridge.stream("read to its end")
            list(self.ended)
            self.future = self.bridge.submit("endless")


def words(request: Any) -> list[str]:
    return ["word "] * (100_000 if request.prompt == "endless" else 2)


def scripted() -> Engine:
    return ScriptedEngine(words, step_time=0.0005)


def function() -> Engine:
    return FunctionEngine(list)


def submitted(bed: Bed) -> concurrent.futures.Future[Any]:
    """A future of whatever this bridge does."""
    tasks, bridge = bed.bridge.tasks(), bed.bridge
    if "generate" in tasks:
        return bridge.submit("a")
    return bridge.submit_call("a") if "call" in tasks else bridge.submit_embed("a")


async def read(bed: Bed) -> None:
    async for _ in bed.bridge.astream("a", timeout=SECONDS):
        pass


Verb = Callable[[Bed], object]
Made = Callable[[], Engine]
ROWS: dict[str, list[tuple[Made, Verb]]] = {
    "infer, embed, rerank, call, map": [
        (scripted, lambda bed: bed.bridge.infer("a", timeout=SECONDS)),
        (scripted, lambda bed: bed.client.infer(["a", "b"], timeout=SECONDS)),
        (ScriptedEncoder, lambda bed: bed.bridge.embed(["a", "b"], timeout=SECONDS)),
        (ScriptedEncoder, lambda bed: bed.bridge.rerank("a", ["b"], timeout=SECONDS)),
        (function, lambda bed: bed.bridge.call("a", timeout=SECONDS)),
        (function, lambda bed: bed.bridge.map(["a", "b"], timeout=SECONDS)),
    ],
    "chat.ask, chat.stream": [
        (scripted, lambda bed: bed.bridge.chat().ask("a", timeout=SECONDS)),
        (scripted, lambda bed: list(bed.bridge.chat().stream("a", timeout=SECONDS))),
    ],
    "stream, stream_many": [
        (scripted, lambda bed: bed.bridge.stream("a")),
        (scripted, lambda bed: bed.bridge.stream_many(["a", "b"])),
    ],
    "submit, submit_embed, submit_call": [
        (scripted, lambda bed: bed.bridge.submit("a")),
        (ScriptedEncoder, lambda bed: bed.bridge.submit_embed("a")),
        (function, lambda bed: bed.bridge.submit_call("a")),
    ],
    "next(stream), stream.wait": [
        (scripted, lambda bed: [next(bed.stream) for _ in range(3)]),  # one may be there already
        (scripted, lambda bed: (next(bed.stream), bed.stream.wait(SECONDS))),
    ],
    "stream.close, leaving its loop": [
        (scripted, lambda bed: bed.stream.close()),
        (scripted, lambda bed: vars(bed).pop("stream")),  # which drops it
    ],
    "stream.response": [(scripted, lambda bed: bed.ended.response)],
    "future.result, future.exception": [
        (scripted, lambda bed: _in_time(bed.future.result)),
        (scripted, lambda bed: _in_time(bed.future.exception)),
    ],
    "future.done, add_done_callback": [
        (scripted, lambda bed: bed.future.done()),
        (scripted, lambda bed: bed.future.add_done_callback(repr)),
    ],
    "future.cancel": [(scripted, lambda bed: bed.future.cancel())],
    "client(), chat()": [(scripted, lambda bed: bed.bridge.client()), (scripted, lambda bed: bed.bridge.chat())],
    "client.close": [(scripted, lambda bed: bed.client.close())],
    "start, with": [(scripted, lambda bed: bed.bridge.start(SECONDS))],
    "swap": [(scripted, lambda bed: bed.bridge.swap(scripted))],
    "abort": [(scripted, lambda bed: bed.bridge.abort(bed.future.request_id))],
    "close": [(scripted, lambda bed: bed.bridge.close())],
    "state, health, requests, metrics": [
        (scripted, lambda bed: (bed.bridge.state, bed.bridge.health(), bed.bridge.requests(), bed.bridge.metrics)),
    ],
    "supports, tasks, describe, repr": [
        (scripted, lambda bed: (bed.bridge.supports(), bed.bridge.tasks(), bed.bridge.describe(), repr(bed.bridge))),
    ],
    "stats, token_texts": [
        (scripted, lambda bed: bed.bridge.stats()),
        (scripted, lambda bed: bed.bridge.token_texts([1])),
    ],
}  # fmt: skip
WAITS_IN_A_TASK = "ainfer, astream, aembed, acall"
TASKS: list[tuple[Made, Callable[[Bed], Any]]] = [
    (scripted, lambda bed: bed.bridge.ainfer("a", timeout=SECONDS)),
    (scripted, read),
    (ScriptedEncoder, lambda bed: bed.bridge.aembed("a", timeout=SECONDS)),
    (function, lambda bed: bed.bridge.acall("a", timeout=SECONDS)),
]


def _in_time(wait: Callable[[float], object]) -> None:
    """A future that is not done is asked for, and not long."""
    with contextlib.suppress(concurrent.futures.TimeoutError):
        if isinstance(ended := wait(0.01), BaseException):
            raise ended


def table() -> dict[str, dict[str, str]]:
    """The page's table: row to column to cell."""
    lines = re.findall(r"^(\S.{34}) (\S+(?: +\S+){7})$", PAGE.read_text(), re.MULTILINE)
    header, *rows = [(name.strip(), cells.split()) for name, cells in lines if not name.startswith("=")]
    return {name: dict(zip(header[1], cells, strict=True)) for name, cells in rows}


# --- the places ---

Place = Callable[[Bed, Callable[[], str]], str]


def thread(bed: Bed, act: Callable[[], str]) -> str:
    return _told(lambda tell: threading.Thread(target=lambda: tell(act())).start())


def callback(bed: Bed, act: Callable[[], str]) -> str:
    return _told(lambda tell: submitted(bed).add_done_callback(lambda _: tell(act())))


def handler(bed: Bed, act: Callable[[], str]) -> str:
    came: list[str] = []
    with _handling(lambda: came.append(act())):
        signal.raise_signal(signal.SIGUSR1)
    return came[0]


def finalizer(bed: Bed, act: Callable[[], str]) -> str:
    came: list[str] = []
    Finalized(lambda: came.append(act()))
    return came[0]


def fork(bed: Bed, act: Callable[[], str]) -> str:
    ours, childs = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(30)
        os.write(childs, act().encode())
        os._exit(0)
    os.close(childs)
    with open(ours) as said:
        came = said.read()
    os.waitpid(pid, 0)
    return came


def loop(bed: Bed, act: Callable[[], str]) -> str:
    async def main() -> str:
        return act()

    return asyncio.run(main())


def engine(bed: Bed, act: Callable[[], str]) -> str:
    return _told(lambda tell: bed.bridge._server_thread.handle.run_soon(lambda: tell(act())))


PLACES: dict[str, Place] = {
    "thread": thread, "callback": callback, "signal": handler, "finalizer": finalizer, "fork": fork, "loop": loop,
    "engine": engine,
}  # fmt: skip


class Finalized:
    def __init__(self, last: Callable[[], object]) -> None:
        self._last = last

    def __del__(self) -> None:
        self._last()


def _told(begin: Callable[[Callable[[str], None]], object]) -> str:
    came = queue.SimpleQueue[str]()
    begin(came.put)
    return came.get(timeout=30)


@contextmanager
def _handling(act: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def sign(verb: Callable[[], object]) -> str:
    """What came of it, as the table has it."""
    try:
        verb()
    except BaseException as error:
        return SIGNS.get(type(error).__name__, repr(error))
    return "yes"


def seen(place: Place, made: Made, verb: Verb) -> str:
    bed = Bed(made)
    try:
        return place(bed, lambda: sign(lambda: verb(bed)))
    finally:
        bed.bridge.close(timeout=5)


# --- the tests ---


def test_the_table_has_each_verb_and_place() -> None:
    """A row without a test would be a promise that nobody keeps."""
    assert set(table()) == {*ROWS, WAITS_IN_A_TASK}
    assert all(list(cells) == [*PLACES, "exit"] for cells in table().values())


@pytest.mark.parametrize("place", PLACES)
def test_a_column(place: str) -> None:
    """Whoever calls from there gets an answer, or the error that the table names."""
    found = {
        (row, number): seen(PLACES[place], made, verb)
        for row, tried in ROWS.items()
        for number, (made, verb) in enumerate(tried)
        if table()[row][place] != "no"
    }
    assert found == {(row, number): table()[row][place] for row, number in found}


@pytest.mark.parametrize("place", ["thread", "callback", "fork"])
def test_async_verbs_by_a_loop_of_their_own(place: str) -> None:
    """``asyncio.run`` serves a thread that has no loop; in a child it says that the bridge stayed behind."""
    wanted = table()[WAITS_IN_A_TASK][place]
    for made, task in TASKS:
        found = seen(PLACES[place], made, lambda bed, task=task: asyncio.run(task(bed)))  # type: ignore[misc]
        assert {"yes": "run"}.get(found, found) == wanted


def test_async_verbs_on_running_loops() -> None:
    """A task on the caller's loop is served, and so is one of an engine's on the server's own."""
    assert [table()[WAITS_IN_A_TASK][place] for place in ("loop", "engine")] == ["yes", "yes"]
    for made, task in TASKS:
        bed = Bed(made)
        asyncio.run(_awaited(task(bed)))
        server = bed.bridge._server_thread.handle.loop
        assert server is not None
        asyncio.run_coroutine_threadsafe(_awaited(task(bed)), server).result(30)
        bed.bridge.close()


async def _awaited(task: Any) -> None:
    await task


AT_EXIT = """
import asyncio, atexit, sys
@atexit.register
def earlier():
    try:
        bed.bridge.infer("a")
    except BridgeClosedError:
        print("closed")
from lmbridge import BridgeClosedError
from tests.docs.test_threads_table import ROWS, TASKS, WAITS_IN_A_TASK, Bed, scripted, sign
beds = {(row, n): (Bed(made), verb) for row, tried in ROWS.items() for n, (made, verb) in enumerate(tried)}
tasks = [(Bed(made), task) for made, task in TASKS]
bed = Bed(scripted)
@atexit.register
def later():
    for (row, _), (bed, verb) in beds.items():
        print(row, sign(lambda: verb(bed)), sep="|")
    for bed, task in tasks:
        print(WAITS_IN_A_TASK, "run" if sign(lambda: asyncio.run(task(bed))) == "yes" else "no", sep="|")
    for bed, _ in (*beds.values(), *tasks):
        bed.bridge.close()
"""


def test_the_column_of_the_exit() -> None:
    """What a program asks for in its last function is done while the bridges are still open, and refused after."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *lines, last = done.stdout.splitlines()
    assert last == "closed", done.stderr
    assert len(lines) > len(ROWS)
    found = [line.split("|") for line in lines]
    assert [(row, said) for row, said in found if table()[row]["exit"] != said] == []


# --- in the middle of anything ---


def strike(act: Callable[[], object], interrupted: Callable[[], object], number: int) -> bool:
    """Have ``act`` run in the middle of a call, at the ``number``-th place where we call something; False: no such."""
    calls, struck = itertools.count(), list[bool]()

    def profile(frame: FrameType, event: str, arg: object) -> None:
        ours = any(f is not None and f.f_globals["__name__"].startswith("lmbridge.") for f in (frame, frame.f_back))
        if event in ("call", "c_call") and ours and next(calls) == number:
            struck.append(True)
            sys.setprofile(None)
            act()

    sys.setprofile(profile)
    try:
        interrupted()
    finally:
        sys.setprofile(None)
    return bool(struck)


SAFE = [(row, place) for row, cells in table().items() for place in ("signal", "finalizer") if cells[place] == "yes"]


@pytest.mark.long
@pytest.mark.parametrize(("row", "place"), SAFE)
def test_in_the_middle_of_a_call(row: str, place: str) -> None:
    """A handler or a finalizer comes while its thread holds a lock of ours: neither that call nor this may hang."""
    for made, verb in ROWS[row]:
        bed, came = Bed(made), list[str]()

        def act(verb: Verb = verb) -> None:
            came.append(PLACES[place](bed, lambda: sign(lambda: verb(bed))))  # noqa: B023

        for number in itertools.count():
            if row != "stream.response" or number == 0:
                bed.bridge.close(timeout=5)
                bed = Bed(made)
            if not strike(act, lambda: submitted(bed).result(SECONDS), number):  # noqa: B023
                break
        bed.bridge.close(timeout=5)
        assert number > 30
        assert came == ["yes"] * number


def test_why_a_handler_does_not_wait() -> None:
    """The main thread may hold a lock that the answer needs: a wait in its handler lasts as long as its deadline."""
    bed = Bed(scripted)
    with bed.bridge._server_thread.handle.gate._lock:
        assert "RequestTimeoutError" in handler(bed, lambda: sign(lambda: bed.bridge.infer("inner", timeout=0.2)))
    bed.bridge.close()


def test_why_a_finalizer_does_not_ask() -> None:
    """A finalizer may run on the server thread, where a new request is refused: what it asks for is lost there."""
    bed = Bed(scripted)
    assert engine(bed, lambda: finalizer(bed, lambda: sign(lambda: bed.bridge.submit("the last words")))) == "W"
    bed.bridge.close()
