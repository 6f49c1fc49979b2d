"""What one call costs: threads ask a function on one event loop that answers at once, each way of asking in turn.

Only the way there and back is measured: calls a second of all threads together, CPU seconds of the process for 1,000
calls, and the median time of one call. ``--busy`` runs another Python thread that computes all the while.

Run: ``python -m tests.benchmarks.call_cost [--threads 1,64,256] [--rounds 5] [--peers bridge,threadsafe]``
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.benchmarks.measure import interleave, print_table
from tests.benchmarks.peers import PEERS, Ask

POLLED_AT_MOST = 64  # threads; with 256 a single round of it takes minutes


@dataclass
class Result:
    """One round of one way."""

    calls_per_s: float
    cpu_s_per_1000: float
    p50_us: float


def run(opened: Callable[[], AbstractContextManager[Ask]], threads: int, seconds: float) -> Result:
    """``threads`` threads ask one call after another until the time is up."""
    latencies: list[list[float]] = [[] for _ in range(threads)]
    ready = threading.Barrier(threads + 1)

    def work(own: list[float]) -> None:
        ask("warm up")
        ready.wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            ask("What is 2 + 3?")
            own.append(time.perf_counter() - start)

    with opened() as ask:
        workers = [threading.Thread(target=work, args=(own,)) for own in latencies]
        for worker in workers:
            worker.start()
        ready.wait()
        start, cpu = time.perf_counter(), time.process_time()
        for worker in workers:
            worker.join()
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    every = [latency for own in latencies for latency in own]
    return Result(len(every) / elapsed, cpu * 1000 / len(every), statistics.median(every) * 1e6)


@contextlib.contextmanager
def busy_neighbour(wanted: bool) -> Iterator[None]:
    """Another Python thread that never gives up the GIL by itself."""
    ended = False

    def compute() -> None:
        while not ended:
            pass

    thread = threading.Thread(target=compute, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        ended = True
        if wanted:
            thread.join()


def compare(threads: int, rounds: int, seconds: float, peers: list[str], busy: bool = False) -> None:
    """Measure and print one table."""
    chosen = {name: PEERS[name] for name in peers if name != "polled" or threads <= POLLED_AT_MOST}

    def candidate(name: str) -> Callable[[], Result]:
        return lambda: run(chosen[name], threads, seconds)

    with busy_neighbour(busy):
        results = interleave({name: candidate(name) for name in chosen}, rounds)
    title = f"One call from {threads} thread{'s' * (threads > 1)}{', beside a busy Python thread' * busy}"
    print_table(f"{title} (in brackets: to threadsafe)", results, "threadsafe")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", default="1,64,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    for threads in map(int, arguments.threads.split(",")):
        compare(threads, arguments.rounds, arguments.seconds, arguments.peers.split(","), arguments.busy)


if __name__ == "__main__":
    main()
