"""Whose turn it is."""

from __future__ import annotations

import time
from contextvars import Context

from lmbridge import GenerationConfig, Request
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel
from lmbridge.server.turns import Turns


class Nobody:
    """An account that is never closed."""

    closed = None


def call(client: str, name: str, priority: int = 0, waited: float = 0.0) -> Call:
    created = time.monotonic() - waited
    request = Request(name, name, GenerationConfig(), False, client, priority, None, created, Context())
    return Call(request, Channel(), Nobody())


def order(*calls: Call) -> list[str]:
    """The ids in the order in which the calls get their turns."""
    turns = Turns()
    for one in calls:
        turns.push(one)
    popped = [turns.pop() for _ in calls]
    assert not turns.lanes
    return [one.request.id for one in popped]


def test_clients_alternate() -> None:
    """However many prompts a client has sent, the others are served in between."""
    calls = [call("a", f"a{n}") for n in range(3)] + [call("b", "b0"), call("c", "c0"), call("b", "b1")]
    assert order(*calls) == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_priority_goes_first() -> None:
    """A higher priority overtakes, within one client too."""
    assert order(call("a", "low"), call("b", "high", 2), call("a", "middle", 1)) == ["high", "middle", "low"]


def test_priorities_age() -> None:
    """A request that has waited long enough is not overtaken for ever by more important ones."""
    assert order(call("a", "new", 2), call("b", "old", 0, waited=35.0)) == ["old", "new"]


def test_removing_keeps_the_order() -> None:
    """A request that is given up while it waits leaves the others where they were."""
    turns = Turns()
    calls = [call("a", "a0"), call("a", "a1"), call("b", "b0", 1)]
    for one in calls:
        turns.push(one)
    turns.remove(calls[0])
    turns.remove(calls[2])
    left = turns.pop()
    assert left is calls[1]
    assert not turns.lanes
