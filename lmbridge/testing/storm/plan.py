"""What one round has in store, drawn from the seed.

Rule: plain data. Acts are dealt from shuffled decks, so that a few rounds see each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Ending = Literal["quiet", "abort", "drain", "crowd"]
"""Quiet: closed when nobody asks any more. The others close beside the callers: at once, draining, by many threads."""

BREAKER = (
    "nothing", "crash", "stall", "block", "seize", "dies_adding", "dies_aborting", "rebuild_fails_once", "unbuildable",
    "dies_for_good", "nothing", "crash", "stall", "block",
)  # fmt: skip
SWAPPER = (
    "nothing", "swap_beside", "swap_in_place", "failing_swap_beside", "failing_swap_in_place", "swaps",
    "swap_beside_a_stall", "swap_in_place_of_a_stall", "swap_in_time", "dies_during_a_swap",
    "dies_during_a_failing_swap", "swap_beside", "swap_in_place", "dies_in_line",
)  # fmt: skip
STARTS = ("plain", "plain", "plain", "slow", "asked", "fails", "closed_while_loading")
ENDINGS: Sequence[Ending] = ("quiet", "abort", "drain", "crowd", "quiet", "abort", "drain")

HARMLESS = {
    "nothing", "is_asked_to_start", "block", "swap_beside", "swap_in_place", "failing_swap_beside",
    "failing_swap_in_place", "swaps", "swap_in_time",
}  # fmt: skip
"""Acts under which no engine dies and none is missing, so that no request may fail for it."""


@dataclass
class Plan:
    """One round. Times are in seconds.

    Attributes:
        requests: how many calls make the round.
        limit: after how long it ends in any case.
        start: how the engine comes up.
        breaker, swapper: what the two saboteurs do, in this order.
        ending: how the bridge is closed.
        flawed: single requests fail by chance.
        reject: a full gate refuses.
        options: of the Bridge.
        engine: of each engine that is built.
        switch: seconds between two threads' turns.
    """

    requests: int
    limit: float
    start: str
    breaker: list[str]
    swapper: list[str]
    ending: Ending
    flawed: bool
    reject: bool
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    switch: float = 0.005

    @property
    def deadly(self) -> bool:
        """Whether an engine may die, or fail to load, in this round."""
        return self.start == "fails" or bool({*self.breaker, *self.swapper} - HARMLESS)

    def __str__(self) -> str:
        acts = ", ".join(act for act in (*self.breaker, *self.swapper) if act != "nothing") or "calm"
        return f"{self.start} start; {acts}; {self.ending}"


def plans(seed: int) -> Iterator[Plan]:
    """One plan after another, without end."""
    chance = Random(f"{seed}/plans")
    breaker, swapper = _deck(chance, BREAKER), _deck(chance, SWAPPER)
    starts, endings = _deck(chance, STARTS), _deck(chance, ENDINGS)
    while True:
        yield _plan(chance, breaker, swapper, next(starts), next(endings))


def _plan(chance: Random, breaker: Iterator[str], swapper: Iterator[str], start: str, ending: Ending) -> Plan:
    reject = chance.random() < 0.3
    plan = Plan(
        requests=chance.randint(800, 3000),
        limit=90.0,
        start=start,
        breaker=[next(breaker) for _ in range(chance.randint(1, 2))],
        swapper=[next(swapper) for _ in range(chance.randint(1, 2))],
        ending=ending,
        flawed=chance.random() < 0.7,
        reject=reject,
        switch=chance.choice((0.005, 0.005, 1e-4, 1e-6)),
    )
    if start == "asked":
        plan.breaker.insert(0, "is_asked_to_start")
    plan.options = {
        "max_pending": chance.choice((4, 16, 48, 1024)),
        "max_pending_per_client": chance.choice((1, 4, 256)),
        "when_full": "reject" if reject else "block",
        "stall_timeout": chance.choice((1.0, 1.5)),
    }
    plan.engine = {
        "max_batch_size": chance.choice((2, 8, 16, 64)),
        "step_time": chance.choice((0.0, 0.0, 0.0005)),
        "load_time": {"slow": 0.3, "closed_while_loading": 3.0}.get(start, 0.0),
    }
    if start == "closed_while_loading":
        plan.limit, plan.breaker, plan.swapper = chance.uniform(0.0, 0.5), ["nothing"], ["nothing"]
    return plan


def _deck(chance: Random, cards: Sequence[T]) -> Iterator[T]:
    while True:
        yield from chance.sample(cards, len(cards))
