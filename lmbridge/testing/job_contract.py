"""What every engine that embeds, reranks or calls a function must do, as tests of a Bridge over it.

Rule: requires only what callers of the Bridge and the server require; uses only public names.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmbridge.bridge import Bridge
from lmbridge.caller.gathered import Gathered
from lmbridge.engines.base import Engine
from lmbridge.errors import BridgeClosedError, EngineDeadError, LMBridgeError, RequestTimeoutError, UnsupportedTaskError
from lmbridge.messages import Task
from lmbridge.testing.witness import WitnessedEngines, has_ended

QUERY = "what is asked for"


class JobContract:
    """Tests for engines that embed, rerank or call a function. Subclass it in a pytest module::

        class TestMyEncoder(JobContract):
            task = "embed"
            items = ["a text", "another text"]

            def engine(self):
                return MyEncoder("a-model")

    Attributes:
        task: the engine's task: ``embed``, ``rerank`` or ``call``.
        items: texts, documents or the function's inputs, with different results.
        poison: an item that fails, if there is one.
        patience: seconds after which a test counts as hanging.
        tolerance: how far two results for one item may differ.
    """

    task: Task = "call"
    items: Sequence[Any] = ()
    poison: Any = None
    patience = 60.0
    tolerance = 1e-5

    def engine(self) -> Engine:
        """A new engine, not started."""
        raise NotImplementedError

    # --- each task with one name ---

    def ask(self, bridge: Bridge, item: Any, timeout: float | None = None) -> Any:
        """The engine's result for one item."""
        timeout = self.patience if timeout is None else timeout
        if self.task == "embed":
            return bridge.embed(item, timeout=timeout)
        if self.task == "rerank":
            return bridge.rerank(QUERY, [item], timeout=timeout)[0].score
        return bridge.call(item, timeout=timeout)

    def ask_all(self, bridge: Bridge, items: Sequence[Any], timeout: float | None = None) -> list[Any]:
        """Its results for a list of items."""
        timeout = self.patience if timeout is None else timeout
        if self.task == "embed":
            return list(bridge.embed(items, timeout=timeout))
        if self.task == "rerank":
            return [response.value for response in bridge.rerank(QUERY, items, timeout=timeout, details=True)]
        return bridge.map(items, timeout=timeout)

    def submit(self, bridge: Bridge, item: Any) -> Gathered[Any]:
        """The future of one item's result."""
        if self.task == "embed":
            return bridge.submit_embed(item)
        return bridge.submit_rerank(QUERY, [item]) if self.task == "rerank" else bridge.submit_call(item)

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two results for one item are the same."""
        if self.task == "embed":
            return bool(one.shape == other.shape and abs(one - other).max() <= self.tolerance)
        return bool(abs(one - other) <= self.tolerance if self.task == "rerank" else one == other)

    def alone(self, bridge: Bridge) -> list[Any]:
        """Each item's result, asked one by one."""
        return [self.ask(bridge, item) for item in self.items]

    def idle(self, bridge: Bridge, engines: WitnessedEngines) -> None:
        """Wait until the engine is idle; it must have ended every request it took."""
        assert engines.latest.in_flight(self.patience) == 0, f"the engine is still working: {bridge.stats()}"
        assert not bridge.requests()

    # --- the tests ---

    def test_results_are_each_items_own(self) -> None:
        """An item has the same result alone, in a list of any order and beside others; other items differ."""
        with Bridge(self.engine) as bridge:
            alone = self.alone(bridge)
            for number, one in enumerate(alone):
                assert not any(self.equal(one, other) for other in alone[:number]), "give items with different results"
            together = self.ask_all(bridge, [*self.items, *reversed(self.items)])
            assert len(together) == 2 * len(alone)
            for one, other in zip([*alone, *reversed(alone)], together, strict=True):
                assert self.equal(one, other)

    def test_results_do_not_mix(self) -> None:
        """Asked by many threads at once, each item gets the same result as alone, and none is lost."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge, ThreadPoolExecutor(16) as pool:
            alone, asked = self.alone(bridge), list(range(len(self.items))) * 8
            results = list(pool.map(lambda number: self.ask(bridge, self.items[number]), asked))
            for number, result in zip(asked, results, strict=True):
                assert self.equal(alone[number], result)
            self.idle(bridge, engines)

    def test_an_item_that_fails_fails_alone(self) -> None:
        """The other items of its batch are unaffected."""
        if self.poison is None:
            return
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            alone = self.alone(bridge)
            futures = [self.submit(bridge, item) for item in (*self.items, self.poison, *self.items)]
            failed = futures.pop(len(self.items))
            assert isinstance(failed.exception(self.patience), LMBridgeError)
            for one, future in zip([*alone, *alone], futures, strict=True):
                assert self.equal(one, self._result(future))
            self.idle(bridge, engines)

    def test_an_item_that_is_left_shifts_nobody(self) -> None:
        """Items waiting or running beside it get their own results, and its place is freed."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            alone = self.alone(bridge)
            futures = [self.submit(bridge, item) for _ in range(8) for item in self.items]
            left = [future.cancel() for future in futures[1::2]]
            assert any(left), "all finished before the second was cancelled; give slower items"
            for number, future in enumerate(futures):
                try:
                    result = self._result(future)
                except concurrent.futures.CancelledError:
                    assert number % 2, "it was not cancelled"
                    continue
                assert self.equal(alone[number % len(alone)], result)
            self.idle(bridge, engines)

    def test_nothing_is_said_after_the_end(self) -> None:
        """A request gets exactly one last delta and none after it, however it ends."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            futures = [self.submit(bridge, item) for item in self.items]
            futures[0].cancel()
            bridge.abort(futures[-1].request_ids[0])
            self.alone(bridge)
        for request_id, deltas in engines.latest.said.items():  # the engine is closed by now
            assert has_ended(deltas[-1:]), f"{request_id} got a delta after its end: {deltas[-3:]}"
            assert len(deltas) == 1, f"{request_id} ended twice: {deltas[-3:]}"

    def test_a_deadline_holds(self) -> None:
        """A call past its deadline raises, and the engine serves the next."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            try:
                self.ask_all(bridge, [*self.items] * 50, timeout=0.0)
            except RequestTimeoutError as error:
                assert error.retryable
            else:
                raise AssertionError("its deadline passed before it was sent")
            assert self.alone(bridge)
            self.idle(bridge, engines)

    def test_other_tasks_are_refused(self) -> None:
        """A task that the engine does not support is refused, without affecting other requests."""
        with Bridge(self.engine) as bridge:
            others: dict[Task, Callable[[], Any]] = {
                "generate": lambda: bridge.infer("text", timeout=self.patience),
                "embed": lambda: bridge.embed("text", timeout=self.patience),
                "rerank": lambda: bridge.rerank(QUERY, ["text"], timeout=self.patience),
                "call": lambda: bridge.call("item", timeout=self.patience),
            }
            bridge.start()
            for task, ask in others.items():
                if task in bridge.tasks():
                    continue
                try:
                    ask()
                except UnsupportedTaskError:
                    continue
                raise AssertionError(f"the engine did not refuse to {task}")
            assert self.alone(bridge)

    def test_death_ends_what_runs_and_a_new_engine_follows(self) -> None:
        """When the engine reports its death, its requests fail, and the next item is answered."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            self.ask(bridge, self.items[0])
            engine = engines.latest.engine
            engines.latest.on_loop(lambda: engine.on_death(RuntimeError("dead by contract")))
            futures = [self.submit(bridge, item) for item in self.items]
            for future in futures:
                error = future.exception(self.patience)
                assert error is None or (isinstance(error, EngineDeadError) and error.retryable), repr(error)
            assert self.alone(bridge)
            assert len(engines.witnesses) == 2

    def test_where_it_stands_is_told_to_anybody(self) -> None:
        """Other threads report stalls: where() answers any thread at any time."""
        engine = self.engine()
        places = [engine.where()]
        with Bridge(engine) as bridge:
            future = self.submit(bridge, self.items[0])
            places.append(engine.where())
            self._result(future)
        places.append(engine.where())
        assert all(isinstance(place, str) for place in places)

    def test_close_with_work_in_flight(self) -> None:
        """Closing ends running requests and leaves no thread behind."""
        before = set(threading.enumerate())
        with Bridge(self.engine) as bridge:
            futures = [self.submit(bridge, item) for _ in range(8) for item in self.items]
            bridge.close()
            for future in futures:
                error = future.exception(self.patience)
                assert error is None or isinstance(error, BridgeClosedError), repr(error)
        end, tick = time.monotonic() + self.patience, threading.Event()
        while left := [thread.name for thread in set(threading.enumerate()) - before if "lmbridge" in thread.name]:
            assert time.monotonic() < end, f"remaining threads: {left}"
            tick.wait(0.01)

    def _result(self, future: Gathered[Any]) -> Any:
        result = future.result(self.patience)
        return result[0].score if self.task == "rerank" else result
