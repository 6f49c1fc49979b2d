"""What it costs to be there: CPU time of connected clients that ask nothing, and memory of clients.

- idle: 256 threads have asked once and wait for something else; CPU of the process, in percent of one core
- polled: the same for queues polled on the loop (see ``peers.polled``)
- client: bytes of Python memory for each of 1,000 clients that have asked once and are idle
- growth: bytes left of 10,000 clients that were made, asked once and dropped

Run: ``python -m tests.benchmarks.idle_cost [--clients 256] [--seconds 5]``
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager

from lmbridge import Bridge
from tests.benchmarks.peers import Ask, InstantEngine, bridge, polled


def idle_cpu(opened: Callable[[], AbstractContextManager[Ask]], clients: int, seconds: float) -> float:
    """Percent of one core that idle clients cost."""
    done = threading.Event()
    ready = threading.Barrier(clients + 1)

    def work() -> None:
        ask("one call")
        ready.wait()
        done.wait()

    with opened() as ask:
        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        ready.wait()
        cpu = time.process_time()
        time.sleep(seconds)
        cpu = time.process_time() - cpu
        done.set()
        for thread in threads:
            thread.join()
    return cpu / seconds * 100


def bytes_per_client(clients: int) -> float:
    """Python memory of one client that has asked once and is idle."""
    with Bridge(InstantEngine) as opened:
        opened.infer("warm up")
        kept = []
        before = _traced()
        for _ in range(clients):
            client = opened.client()
            client.infer("one call")
            kept.append(client)
        return (_traced() - before) / clients


def growth(clients: int) -> int:
    """Bytes left of clients that have come and gone."""
    with Bridge(InstantEngine) as opened:

        def come_and_go(count: int) -> None:
            for _ in range(count):
                opened.client().infer("one call")

        come_and_go(1000)
        before = _traced()
        come_and_go(clients)
        return _traced() - before


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    print(f"\n{arguments.clients} idle clients, percent of one core")
    print(f"bridge  {idle_cpu(bridge, arguments.clients, arguments.seconds):8.3f}")
    print(f"polled  {idle_cpu(polled, min(arguments.clients, 64), arguments.seconds):8.3f}  (with at most 64)")
    tracemalloc.start()
    print(f"\nAn idle client: {bytes_per_client(1000) / 1024:.2f} KiB")
    print(f"Left of 10,000 clients that came and went: {growth(10_000) / 1024:.2f} KiB")


if __name__ == "__main__":
    main()
