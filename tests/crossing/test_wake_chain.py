"""Threads that wait for the same step of the engine wake one another, and none is forgotten."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from lmbridge import Bridge
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.testing import ScriptedEngine
from tests.conftest import until_then

CROWD = 48


def answers_of_one_step() -> list[str]:
    """What a crowd of threads gets that one step answers."""
    engine = ScriptedEngine(manual=True, max_batch_size=CROWD)
    with Bridge(engine) as bridge, ThreadPoolExecutor(CROWD) as pool:
        asked = [pool.submit(bridge.infer, str(number), timeout=60) for number in range(CROWD)]
        engine.wait_for(lambda e: e.active == CROWD)
        engine.step()
        return [future.result(60).text for future in asked]


def test_a_crowd_is_answered() -> None:
    assert answers_of_one_step() == [str(number) for number in range(CROWD)]


def test_a_crowd_is_answered_beside_a_busy_thread() -> None:
    """Where each hand-over takes long, everybody is woken at once."""
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            sum(range(1000))

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        assert answers_of_one_step() == [str(number) for number in range(CROWD)]
    finally:
        ended.set()
        busy.join()


def test_a_thread_that_does_not_pass_on_keeps_nobody_asleep() -> None:
    """It may have been killed as it woke."""
    waiters = [threading.Lock() for _ in range(CROWD)]
    for waiter in waiters:
        waiter.acquire()

    async def all_woken() -> None:
        wakes = WakeChain(ring=lambda: None)
        wakes.attach(asyncio.get_running_loop())
        for waiter in waiters:
            wakes.wake(waiter)
        await until_then(lambda: not any(waiter.locked() for waiter in waiters))

    asyncio.run(all_woken())


def test_who_sends_while_others_wake_is_heard() -> None:
    """The doorbell is held back only as long as somebody is still to wake, who may have something to send too."""
    rung: list[int] = []

    async def send_during() -> None:
        wakes = WakeChain(ring=lambda: rung.append(1))
        wakes.attach(asyncio.get_running_loop())
        waiters = [threading.Lock() for _ in range(3)]
        for waiter in waiters:
            waiter.acquire()
            wakes.wake(waiter)
        wakes.start()  # the first wakes
        wakes.ring()
        assert rung == []
        wakes.pass_on()
        wakes.pass_on()
        assert rung == []  # the last is about to wake
        wakes.pass_on()
        assert rung == [1]
        wakes.ring()
        assert rung == [1, 1]

    asyncio.run(send_during())
