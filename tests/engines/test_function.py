"""Any function from a list to a list, called with single items by many threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lmbridge import (
    Bridge,
    EngineError,
    FunctionEngine,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedTaskError,
    WrongThreadError,
    function_engine,
)
from tests.conftest import until_living


def double(items: list[Any]) -> list[Any]:
    return [2 * item for item in items]


def test_every_verb() -> None:
    """call and map, their futures and their forms for other loops, all give each item its own result."""
    with Bridge(function_engine(double)) as bridge:
        assert bridge.call(3) == 6
        assert bridge.map([1, 2, 3]) == [2, 4, 6]
        assert bridge.map([]) == []
        assert bridge.map((1, 2), progress=True) == [2, 4]
        assert bridge.submit_call(5).result(30) == 10

        async def others() -> None:
            assert await bridge.acall(4) == 8
            assert await bridge.amap([1, 2]) == [2, 4]

        asyncio.run(others())
        with bridge.client("mine") as client:
            assert client.call("a", timeout=30, priority=2, request_id="own") == "aa"
        assert bridge.describe() == "double (a function)"


def test_a_function_that_calls_its_own_bridge_is_told() -> None:
    """It would wait for itself until the bridge is taken for stalled; another bridge is nobody's business."""
    asked: list[Any] = []

    def nested(items: list[Any]) -> list[Any]:
        for ask in asking if 7 in items else []:
            try:
                asked.append(ask(1))
            except WrongThreadError as error:
                asked.append(str(error))
        return items

    other, own = Bridge(function_engine(double)), Bridge(function_engine(nested))
    asking: list[Callable[[Any], Any]] = [own.call, lambda item: own.submit_call(item).result(), other.call]
    with other, own:
        assert own.call(7, timeout=30) == 7
        assert own.call(8, timeout=30) == 8  # and the next are served
    for told in (asked[0], asked[1]):
        assert "would wait for itself forever" in told
    assert asked[2] == 2


def test_a_coroutine_function_runs_on_the_loop() -> None:
    """Work that awaits, a remote model say, needs no thread."""
    threads = set()

    async def remote(items: list[int]) -> list[int]:
        threads.add(threading.current_thread().name)
        await asyncio.sleep(0)
        return double(items)

    with Bridge(function_engine(remote)) as bridge:
        assert bridge.map([1, 2, 3]) == [2, 4, 6]
    assert threads == {"lmbridge server"}


@pytest.mark.parametrize("results", [np.arange(3), (0, 1, 2)])
def test_other_lists_are_taken(results: Any) -> None:
    """A model returns arrays; their rows are the items' results."""
    with Bridge(function_engine(lambda items: results, max_batch_size=3, batch_timeout=60)) as bridge:
        assert bridge.map(["a", "b", "c"]) == [0, 1, 2]


def test_rows_of_an_array_are_items_and_results() -> None:
    """Vectors in, vectors out: what numpy and torch hold is taken row by row."""
    with Bridge(function_engine(lambda rows: np.stack(rows) * 2, max_batch_size=4)) as bridge:
        assert (np.stack(bridge.map(np.eye(3))) == np.eye(3) * 2).all()
        assert (bridge.call(np.ones(2)) == [2, 2]).all()


@pytest.mark.parametrize("wrong", [None, 7, "ab", {"a": 1}])
def test_what_is_no_list_is_named(wrong: Any) -> None:
    """A function that forgets to return must not leave its callers waiting."""
    with Bridge(function_engine(lambda items: wrong)) as bridge, pytest.raises(EngineError, match="list of results"):
        bridge.call(1, timeout=30)


def test_crowds_do_not_mix() -> None:
    """64 threads with single items, beside one with a long list: each gets what is its own, in few batches."""
    sizes: list[int] = []

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return double(items)

    with Bridge(function_engine(work, max_batch_size=16)) as bridge, ThreadPoolExecutor(65) as pool:
        long = pool.submit(bridge.map, list(range(5000)))
        singles = [pool.submit(lambda n=n: [bridge.call(n * 100 + i) for i in range(50)]) for n in range(64)]  # type: ignore[misc]
        assert [single.result(60) for single in singles] == [[2 * (n * 100 + i) for i in range(50)] for n in range(64)]
        assert long.result(60) == [2 * n for n in range(5000)]
    assert sum(sizes) == 5000 + 64 * 50
    assert max(sizes) == 16


def test_a_long_list_and_a_single_take_turns() -> None:
    """Whoever asks for one thing must not wait for all of another's ten thousand."""
    seen: list[Any] = []
    hold = threading.Event()

    def work(items: list[Any]) -> list[Any]:
        hold.wait(30)
        seen.extend(items)
        return items

    with Bridge(function_engine(work, max_batch_size=4)) as bridge, ThreadPoolExecutor(2) as pool:
        long = pool.submit(bridge.map, list(range(200)))
        until_living(bridge, 200)
        single = pool.submit(bridge.call, "single")
        until_living(bridge, 201)
        hold.set()
        assert single.result(30) == "single"
        long.result(30)
    assert seen.index("single") <= 9


def test_an_item_that_fails_is_named_by_its_place() -> None:
    """The others' results are there for who wants them; else the error says which item it was."""

    def work(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    with Bridge(function_engine(work)) as bridge:
        results = bridge.map([1, 0, 2], return_exceptions=True)
        assert [results[0], results[2]] == [1.0, 0.5]
        assert isinstance(results[1].__cause__, ZeroDivisionError)
        with pytest.raises(EngineError, match="Item 1 of the list"):
            bridge.map([1, 0, 2])


def test_a_function_that_ends_its_thread_or_hangs_costs_its_own_callers() -> None:
    """exit() in a library fails those items alone; a deadline holds while the function does not return."""
    hold = threading.Event()

    def work(items: list[Any]) -> list[Any]:
        if "exit" in items:
            raise SystemExit(3)
        if "hang" in items:
            hold.wait(60)
        return items

    with Bridge(function_engine(work)) as bridge:
        with pytest.raises(EngineError, match="SystemExit"):
            bridge.call("exit", timeout=30)
        assert bridge.call("on", timeout=30) == "on"
        with pytest.raises(RequestTimeoutError):
            bridge.call("hang", timeout=0.1)
        hold.set()
        assert bridge.call("on", timeout=30) == "on"


def test_other_tasks_are_refused_by_name() -> None:
    """Whoever asks a function for text, or a language model for a vector, is told what there is instead."""
    with Bridge(function_engine(double)) as bridge:
        with pytest.raises(UnsupportedTaskError, match=r"'function' cannot embed.*engine='encoder'"):
            bridge.embed("text")
        with pytest.raises(UnsupportedTaskError, match="cannot generate text"):
            bridge.infer("text")
        with pytest.raises(UnsupportedTaskError, match="cannot rerank"):
            bridge.rerank("query", ["document"])


def test_options_are_checked_early() -> None:
    """A mistake is told where it is made, before anything runs."""
    for options in ({"max_batch_size": 0}, {"max_batch_size": 2.5}, {"batch_timeout": -1}, {"batch_timeout": "1"}):
        with pytest.raises(InvalidRequestError, match=next(iter(options))):
            function_engine(double, **options)
    with pytest.raises(InvalidRequestError, match="needs a function"):
        FunctionEngine(7)  # type: ignore[arg-type]
    with Bridge(function_engine(double)) as bridge:
        with pytest.raises(InvalidRequestError, match="call has no option 'temperature'"):
            bridge.call(1, temperature=0.5)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequestError, match="items must be a list"):
            bridge.map("abc")
        with pytest.raises(InvalidRequestError, match="timeout"):
            bridge.map([1], timeout=-1)


def test_an_awaitable_from_a_plain_function_is_explained() -> None:
    """A wrapped coroutine function does not look like one; its callers must hear what to write."""

    async def remote(items: list[int]) -> list[int]:
        return items

    closed: list[Any] = []

    def wrapped(items: list[int]) -> Any:
        closed.append(remote(items))
        return closed[-1]

    with Bridge(function_engine(wrapped)) as bridge, pytest.raises(EngineError, match="async def"):
        bridge.call(1, timeout=30)
    for coroutine in closed:
        coroutine.close()


def test_a_coroutine_function_may_not_end_the_bridge() -> None:
    """exit(), a cancellation of its own and StopIteration fail those items; the loop serves on."""

    async def remote(items: list[str]) -> list[str]:
        for item in items:
            if item == "exit":
                raise SystemExit(1)
            if item == "interrupt":
                raise KeyboardInterrupt
            if item == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            if item == "cancelled":
                raise asyncio.CancelledError
        return items

    with Bridge(function_engine(remote)) as bridge:
        for item in ("exit", "interrupt", "cancel", "cancelled"):
            with pytest.raises(EngineError):
                bridge.call(item, timeout=30)
            assert bridge.call("on", timeout=30) == "on"


def test_a_coroutine_whose_callers_have_left_is_cancelled() -> None:
    """What nobody waits for must not hold up the next batch."""
    cancelled = threading.Event()

    async def remote(items: list[str]) -> list[str]:
        if items == ["slow"]:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return items

    with Bridge(function_engine(remote)) as bridge:
        with pytest.raises(RequestTimeoutError, match="it was aborted"):
            bridge.call("slow", timeout=0.05)
        assert cancelled.wait(30)
        assert bridge.call("on", timeout=30) == "on"


def test_results_that_are_hostile() -> None:
    """A list that raises when it is looked at fails its batch, and no other."""

    class Hostile(list[Any]):
        def __iter__(self) -> Any:
            raise ValueError("do not look")

    with Bridge(function_engine(lambda items: Hostile(items) if "bad" in items else items)) as bridge:
        with pytest.raises(EngineError, match="do not look"):
            bridge.call("bad", timeout=30)
        assert bridge.call("on", timeout=30) == "on"


def test_a_function_without_its_engine_is_explained() -> None:
    """Bridge(process_batch) is the first thing that people write."""
    with pytest.raises(InvalidRequestError, match=r"function_engine\(double\)"):
        Bridge(double)  # type: ignore[arg-type]


def test_its_name_is_used() -> None:
    """Of several functions a message must say which."""
    named = function_engine(double, name="labels")
    with Bridge(named) as bridge, pytest.raises(UnsupportedTaskError, match="The engine 'labels'"):
        bridge.embed("x")
    with pytest.raises(InvalidRequestError, match="name must be a non-empty string"):
        function_engine(double, name="")
