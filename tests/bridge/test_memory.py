"""What a bridge keeps of callers that came and went: nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from lmbridge import Bridge
from lmbridge.testing import ScriptedEngine
from tests.conftest import until


def by_client(bridge: Bridge, number: int) -> None:
    with bridge.client(f"user {number}") as client:
        client.infer("hello")


def by_client_that_is_dropped(bridge: Bridge, number: int) -> None:
    client = bridge.client()
    client.infer("hello")
    next(client.stream("hello and goodbye"))


def by_name(bridge: Bridge, number: int) -> None:
    bridge.infer("hello", client=f"user {number}")


def by_future(bridge: Bridge, number: int) -> None:
    bridge.submit("hello", client=f"user {number}").result(30)


def by_thread(bridge: Bridge, number: int) -> None:
    thread = threading.Thread(target=bridge.infer, args=("hello",))
    thread.start()
    thread.join()


def by_loop(bridge: Bridge, number: int) -> None:
    asyncio.run(bridge.ainfer("hello"))


@pytest.mark.parametrize(
    ("come_and_go", "count"),
    [
        (by_client, 3000),
        pytest.param(by_client, 10_000, marks=pytest.mark.long),
        (by_client_that_is_dropped, 1000),
        (by_name, 2000),
        (by_future, 2000),
        (by_thread, 1000),
        (by_loop, 500),
    ],
)
def test_callers_that_are_gone_leave_nothing(come_and_go: Callable[[Bridge, int], None], count: int) -> None:
    """A server that lives for months would grow with everybody who ever asked it something."""
    engine = ScriptedEngine()

    def traced(numbers: range) -> int:
        """Bytes in use once those have come and gone."""
        for number in numbers:
            come_and_go(bridge, number)
        until(lambda: not bridge.requests())
        engine.started.clear()
        engine.aborted.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with Bridge(engine) as bridge:
        tracemalloc.start()
        half = count // 2
        sizes = [traced(range(500)), traced(range(500, 500 + half)), traced(range(500 + half, 500 + 2 * half))]
        tracemalloc.stop()
    grown = min(after - before for before, after in itertools.pairwise(sizes))  # Python itself may take some, once
    assert grown / half < 20  # bytes; an account with its pair of queues takes thousands
