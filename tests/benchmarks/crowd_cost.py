"""What a crowd costs whoever waits beside it: lists awaited on an event loop, and callers in front of a full gate.

Three questions, the ways of each in turn within a round: what 4,000 prompts cost as ``infer(list)``, as
``ainfer(list)`` and as one task each; what a place that falls free costs while many stand in front of the gate; how
long a neighbour waits for one answer beside 10,000 prompts of another caller.

Run: ``python -m tests.benchmarks.crowd_cost [--rounds 5]``
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable

from lmbridge import Bridge
from lmbridge.testing import ScriptedEngine

PROMPTS = 4000
CROWD = 10_000
NEIGHBOURS = 300


def infer_list(bridge: Bridge, count: int) -> None:
    bridge.infer(["q"] * count)


def ainfer_list(bridge: Bridge, count: int) -> None:
    asyncio.run(bridge.ainfer(["q"] * count))


def ainfer_tasks(bridge: Bridge, count: int) -> None:
    async def ask() -> None:
        await asyncio.gather(*(bridge.ainfer("q") for _ in range(count)))

    asyncio.run(ask())


def cpu(work: Callable[[], None]) -> float:
    """CPU seconds of the process while ``work`` runs."""
    start = time.process_time()
    work()
    return time.process_time() - start


def of_lists(rounds: int) -> None:
    """CPU time for as many prompts in each way, and for a quarter of them, which linear ways do in a quarter of it."""
    ways = (infer_list, ainfer_list, ainfer_tasks)
    found: dict[str, list[tuple[float, float]]] = {way.__name__: [] for way in ways}
    with Bridge(lambda: ScriptedEngine(lambda request: ["x"])) as bridge:
        for _ in range(rounds):
            for way in ways:
                quarter = cpu(lambda way=way: way(bridge, PROMPTS // 4))  # type: ignore[misc]
                found[way.__name__].append((quarter, cpu(lambda way=way: way(bridge, PROMPTS))))  # type: ignore[misc]
    base = [whole for _, whole in found["infer_list"]]
    print(f"CPU time of {PROMPTS} prompts; against infer(list); against a quarter as many")
    for name, results in found.items():
        ratio = statistics.median(whole / alone for (_, whole), alone in zip(results, base, strict=True))
        growth = statistics.median(whole / quarter for quarter, whole in results)
        print(f"  {name:<14} {statistics.median(w for _, w in results) * 1000:7.0f} ms {ratio:6.2f} {growth:6.2f}")


def of_places(rounds: int) -> None:
    """Answers a second of a full bridge with so many more threads' prompts in front of its gate."""
    print("answers a second with so many tasks in front of the gate; against 100")
    found: dict[int, list[float]] = {100: [], 1000: [], 5000: []}
    for _ in range(rounds):
        for waiting, results in found.items():
            with Bridge(lambda: ScriptedEngine(lambda request: ["x"]), max_pending=64) as bridge:
                start = time.perf_counter()
                ainfer_tasks(bridge, waiting + 64)
                results.append((waiting + 64) / (time.perf_counter() - start))
    for waiting, results in found.items():
        ratio = statistics.median(own / few for own, few in zip(results, found[100], strict=True))
        print(f"  {waiting:>6} {statistics.median(results):8.0f} {ratio:6.2f}")


def of_neighbours(rounds: int) -> None:
    """How long one thread waits for a one-token answer, alone and beside a list of very many."""
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(rounds):
        with Bridge(lambda: ScriptedEngine(lambda request: ["x"], step_time=0.001)) as bridge:
            alone += ask_beside(bridge, lambda: None)
            beside += ask_beside(bridge, lambda: ainfer_list(bridge, CROWD))
    print(f"one answer for a neighbour of {CROWD} prompts: median and 99th percentile, in ms")
    for name, waits in (("alone", alone), ("beside", beside)):
        print(f"  {name:<8} {statistics.median(waits) * 1000:6.2f} {sorted(waits)[int(len(waits) * 0.99)] * 1000:6.2f}")


def ask_beside(bridge: Bridge, crowd: Callable[[], None]) -> list[float]:
    """The waits of one thread, as long as the crowd is there, which comes again as often as needed."""
    through = threading.Event()

    def come() -> None:
        crowd()
        while not through.is_set():
            crowd()
            through.wait(0.001)

    coming = threading.Thread(target=come)
    coming.start()
    waits: list[float] = []
    try:
        for _ in range(NEIGHBOURS):
            start = time.perf_counter()
            bridge.infer("neighbour")
            waits.append(time.perf_counter() - start)
    finally:
        through.set()
        coming.join()
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    of_lists(rounds)
    of_places(rounds)
    of_neighbours(rounds)


if __name__ == "__main__":
    main()
