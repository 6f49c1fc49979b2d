"""Single items become batches: nobody waits for nothing, and nobody pays for another's item."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Sequence
from typing import Any

import pytest

from lmbridge import EngineError, InvalidRequestError
from lmbridge.engines.batching import Batcher
from lmbridge.messages import Delta


class Model:
    """Doubles numbers, in batches that wait until they are let go; some items fail, and some batches are too large."""

    def __init__(self, *, poison: Sequence[int] = (), fits: int | None = None, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()
        self.begun = asyncio.Event()
        self._poison = set(poison)
        self._fits = fits
        if not held:
            self.free.set()

    async def __call__(self, items: list[int]) -> list[Any]:
        self.batches.append(items)
        self.begun.set()
        await self.free.wait()
        if self._fits is not None and len(items) > self._fits:
            raise MemoryError(f"{len(items)} are too many")
        if self._poison & set(items):
            raise ValueError("poison")
        return [2 * item for item in items]


class Desk:
    """Puts numbers in, and collects what comes of them."""

    def __init__(self, batcher: Batcher[int]) -> None:
        self.batcher = batcher
        self.ends: dict[int, list[Delta]] = {}
        self._all = asyncio.Event()

    def add(self, *items: int, size: int = 1, client: str = "") -> None:
        self._all.clear()
        for item in items:
            self.ends[item] = []
            self.batcher.add(str(item), item, functools.partial(self._hear, item), size=size, client=client)

    async def values(self) -> dict[int, Any]:
        """What became of each: its value, its error, or "abort"."""
        await asyncio.wait_for(self._all.wait(), 30)
        assert [len(ends) for ends in self.ends.values()] == [1] * len(self.ends)
        return {item: ends[0].error or ends[0].value or ends[0].finish_reason for item, ends in self.ends.items()}

    def _hear(self, item: int, delta: Delta) -> None:
        self.ends[item].append(delta)
        if all(self.ends.values()):
            self._all.set()


def test_what_waits_goes_together() -> None:
    """The first runs at once, alone; what comes while it runs is the next batch, in order."""

    async def main() -> None:
        model = Model(held=True)
        desk = Desk(Batcher(model, max_items=8))
        desk.add(1)
        await asyncio.wait_for(model.begun.wait(), 30)
        desk.add(2, 3, 4)
        model.free.set()
        assert await desk.values() == {1: 2, 2: 4, 3: 6, 4: 8}
        assert model.batches == [[1], [2, 3, 4]]

    asyncio.run(main())


def test_limits_hold() -> None:
    """Count and size bound a batch, and what is larger than every batch runs alone instead of never."""

    async def main() -> None:
        model = Model()
        desk = Desk(Batcher(model, max_items=3, max_size=10))
        desk.add(1, 2, 3, 4, size=1)
        desk.add(5, 6, size=9)
        desk.add(7, size=99)
        desk.add(8)
        assert await desk.values() == {n: 2 * n for n in range(1, 9)}
        assert model.batches == [[1, 2, 3], [4, 5], [6], [7], [8]]

    asyncio.run(main())


def test_only_the_poison_fails() -> None:
    """A batch that raises is taken apart until only the items that raise by themselves have failed."""

    async def main() -> None:
        model = Model(poison=[3, 11])
        desk = Desk(Batcher(model, max_items=16))
        desk.add(*range(1, 17))
        values = await desk.values()
        bad = {item: values.pop(item) for item in (3, 11)}
        assert values == {n: 2 * n for n in range(1, 17) if n not in (3, 11)}
        assert all(isinstance(error, EngineError) and "poison" in str(error) for error in bad.values())

    asyncio.run(main())


def test_a_lack_of_memory_is_remembered() -> None:
    """A batch that is too large for the memory is halved, and no later one is as large."""

    async def main() -> None:
        model = Model(fits=4)
        desk = Desk(Batcher(model, max_items=16, max_size=100))
        desk.add(*range(1, 17))
        assert await desk.values() == {n: 2 * n for n in range(1, 17)}
        model.batches.clear()
        desk.add(*range(20, 36))
        await desk.values()
        assert max(map(len, model.batches)) <= 4

    asyncio.run(main())


def test_an_item_that_needs_too_much_memory_fails_alone() -> None:
    """It cannot be halved; it must not be tried for ever, nor make every later batch tiny."""

    async def main() -> None:
        model = Model(fits=0)
        batcher = Batcher(model, max_items=4, max_size=8)
        desk = Desk(batcher)
        desk.add(1)
        assert isinstance((await desk.values())[1], EngineError)
        assert batcher.max_size == 8

    asyncio.run(main())


@pytest.mark.parametrize("results", [[], [1], [1, 2, 3]])
def test_a_wrong_count_is_an_error_of_that_batch(results: list[int]) -> None:
    """Results that cannot be told apart must go to nobody; the next batch is served."""

    async def main() -> None:
        answers: list[list[int]] = [results, [7]]

        async def run(items: list[int]) -> list[int]:
            return answers.pop(0)

        desk = Desk(Batcher(run, max_items=4))
        desk.add(1, 2)
        values = await desk.values()
        assert all(f"{len(results)} results for 2 items" in str(error) for error in values.values())
        desk = Desk(desk.batcher)
        desk.add(3)
        assert await desk.values() == {3: 7}

    asyncio.run(main())


def test_exceptions_in_a_list_are_those_items_own() -> None:
    """A function may fail single items by itself, with errors of lmbridge's too."""

    async def main() -> None:
        async def run(items: list[int]) -> list[Any]:
            return [10, KeyError("two"), InvalidRequestError("three")]

        desk = Desk(Batcher(run, max_items=4))
        desk.add(1, 2, 3)
        values = await desk.values()
        assert values[1] == 10
        assert isinstance(values[2].__cause__, KeyError)
        assert str(values[3]) == "three"

    asyncio.run(main())


def test_an_item_that_was_cancelled_shifts_nobody() -> None:
    """Whether it waits or runs, the others get their own results, and it hears of its end once."""

    async def main() -> None:
        model = Model(held=True)
        desk = Desk(Batcher(model, max_items=3))
        desk.add(1, 2, 3)
        await asyncio.wait_for(model.begun.wait(), 30)
        desk.add(4, 5, 6)
        assert desk.batcher.discard("2")
        assert desk.batcher.discard("5")
        assert not desk.batcher.discard("5")
        model.free.set()
        assert await desk.values() == {1: 2, 2: "abort", 3: 6, 4: 8, 5: "abort", 6: 12}
        assert model.batches == [[1, 2, 3], [4, 6]]
        assert len(desk.batcher) == 0

    asyncio.run(main())


def test_a_batch_that_waits_for_more_leaves_when_it_is_full() -> None:
    """batch_timeout is for those who want it, and the longest that anybody waits; a full batch leaves at once."""

    async def main() -> None:
        model = Model()
        desk = Desk(Batcher(model, max_items=2, wait=3600))
        desk.add(1)
        await asyncio.sleep(0)
        assert not model.batches
        desk.add(2)
        assert await desk.values() == {1: 2, 2: 4}
        assert model.batches == [[1, 2]]
        desk = Desk(Batcher(model, max_items=2, wait=0.001))
        desk.add(3)
        assert await desk.values() == {3: 6}

    asyncio.run(main())


def test_a_cap_for_now_bounds_each_batch() -> None:
    """Beside others on its device an engine takes shorter turns, and longer ones again when it is alone."""

    async def main() -> None:
        caps: list[int | None] = [2, 1, None]
        model = Model()
        desk = Desk(Batcher(model, max_items=8, cap=lambda: caps.pop(0)))
        desk.add(*range(1, 8))
        await desk.values()
        assert model.batches == [[1, 2], [3], [4, 5, 6, 7]]

    asyncio.run(main())


def test_close_ends_it() -> None:
    """Nothing runs on after the engine was closed, and no task is left on the loop."""

    async def main() -> None:
        model = Model(held=True)
        desk = Desk(Batcher(model, max_items=1))
        desk.add(1, 2)
        await asyncio.wait_for(model.begun.wait(), 30)
        desk.batcher.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(left, timeout=30)
        assert model.batches == [[1]]
        assert len(desk.batcher) == 0

    asyncio.run(main())


def test_a_poison_that_says_it_is_too_large_costs_itself_alone() -> None:
    """An item that needs too much memory by itself must not make every later batch tiny."""

    async def main() -> None:
        async def run(items: list[int]) -> list[int]:
            if 3 in items:
                raise RuntimeError("out of memory, it says")
            return items

        batcher = Batcher(run, max_items=8, max_size=8)
        desk = Desk(batcher)
        desk.add(*range(1, 9))
        values = await desk.values()
        assert isinstance(values.pop(3), EngineError)
        assert len(values) == 7
        assert batcher.max_size == 8

    asyncio.run(main())


def test_clients_take_turns_also_where_each_text_fills_a_batch() -> None:
    """A long list of large texts must not go before somebody's one, batch after batch."""

    async def main() -> None:
        model = Model(held=True)
        desk = Desk(Batcher(model, max_items=8, max_size=10))
        desk.add(*range(1, 21), size=10, client="list")
        await asyncio.wait_for(model.begun.wait(), 30)
        desk.add(99, size=10, client="single")
        model.free.set()
        await desk.values()
        assert model.batches.index([99]) <= 2

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["class", "text", "end"])
def test_results_and_errors_that_are_hostile_cost_their_own(kind: str) -> None:
    """Whatever a model's results do when they are looked at, the others have theirs and the next batch runs."""

    class HostileClass:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise ValueError("no class")

    class HostileTextError(Exception):
        def __str__(self) -> str:
            raise SystemExit(1)

        __repr__ = __str__

    async def main() -> None:
        async def run(items: list[int]) -> list[Any]:
            if kind == "text" and 1 in items:
                raise HostileTextError
            if kind == "end" and 1 in items:
                raise GeneratorExit
            return [HostileClass() if kind == "class" and item == 1 else 2 * item for item in items]

        desk = Desk(Batcher(run, max_items=4))
        desk.add(1, 2, 3)
        await asyncio.wait_for(desk._all.wait(), 30)
        assert [desk.ends[item][0].value for item in (2, 3)] == [4, 6]
        desk.add(4)
        assert (await desk.values())[4] == 8

    asyncio.run(main())


def test_context_variables_are_nobodys() -> None:
    """What the first caller has in its context, a trace say, must not show in the batches of all later ones."""
    user = contextvars.ContextVar("user", default="nobody")

    async def main() -> None:
        seen: list[str] = []

        async def run(items: list[int]) -> list[int]:
            seen.append(user.get())
            return items

        desk = Desk(Batcher(run, max_items=4))
        user.set("the first")
        desk.add(1, 2)
        await desk.values()
        assert seen == ["nobody"]

    asyncio.run(main())
