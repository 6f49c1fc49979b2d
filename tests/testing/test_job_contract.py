"""The contract of engines that generate no text: the function engine keeps it, and engines that break it are found."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import Engine, FunctionEngine, Request
from lmbridge.engines.base import Sink
from lmbridge.messages import Delta
from lmbridge.testing import JobContract, ScriptedEncoder

ITEMS = ["one", "two", "three", "four", "five"]


def shout(items: list[str]) -> list[Any]:
    return [ValueError("poison") if item == "poison" else item.upper() for item in items]


async def shout_later(items: list[str]) -> list[Any]:
    return shout(items)


class TestFunction(JobContract):
    """A plain function keeps the contract."""

    items = ITEMS
    poison = "poison"

    def engine(self) -> Engine:
        return FunctionEngine(shout, max_batch_size=3)


class TestCoroutineFunction(TestFunction):
    """So does one that awaits."""

    def engine(self) -> Engine:
        return FunctionEngine(shout_later, max_batch_size=3)


class Twice(FunctionEngine):
    """Says the end of each item twice."""

    def __init__(self) -> None:
        super().__init__(shout)

    def add_request(self, request: Request, sink: Sink) -> None:
        def twice(delta: Delta) -> None:
            sink(delta)
            sink(delta)

        super().add_request(request, twice)


class Spoiled(FunctionEngine):
    """Fails a whole batch with one item."""

    def __init__(self) -> None:
        super().__init__(self._all_or_nothing, max_batch_size=16)

    def _all_or_nothing(self, items: list[str]) -> list[Any]:
        results = shout(items)
        bad = [result for result in results if isinstance(result, Exception)]
        return bad * len(items) if bad else results


@pytest.mark.parametrize(
    ("kind", "test"),
    [(Twice, "test_nothing_is_said_after_the_end"), (Spoiled, "test_an_item_that_fails_fails_alone")],
)
def test_an_engine_that_breaks_it_is_found(kind: type[FunctionEngine], test: str) -> None:
    """An engine that is wrong in one way fails the test that names it."""

    class Contract(JobContract):
        items = ITEMS
        poison = "poison"
        patience = 10.0

        def engine(self) -> Engine:
            return kind()  # type: ignore[call-arg]

    with pytest.raises(Exception, match=r"."):
        getattr(Contract(), test)()


class TestScriptedEmbedder(JobContract):
    """The scripted encoder keeps it."""

    task = "embed"
    items = ITEMS

    def engine(self) -> Engine:
        return ScriptedEncoder(max_batch_size=3)


class TestScriptedReranker(JobContract):
    """So does it as a reranker."""

    task = "rerank"
    items = ("what", "what is", "what is asked", "what is asked for", "none of it")

    def engine(self) -> Engine:
        return ScriptedEncoder(max_batch_size=3)
