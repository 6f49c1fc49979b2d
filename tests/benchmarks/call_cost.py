"""What one call through the bridge costs, beside what people use instead.

The engine answers at once, so that nothing but the way there and back is measured. Candidates, interleaved in one
process, medians of the rounds, ratios to ``run_coroutine_threadsafe`` within each round:

- bridge: ``bridge.infer`` with its defaults and a deadline
- threadsafe: ``asyncio.run_coroutine_threadsafe(...).result(timeout)``
- polled: LMDeploy's recipe: a queue per client, polled on the loop with ``sleep(0)``

Run: ``python tests/benchmarks/call_cost.py [--threads 1,64] [--rounds 5] [--seconds 1]``
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmbridge import Bridge, Delta, Engine, Request, Usage
from lmbridge.engines.base import Sink

LIMIT = 30.0  # seconds; the deadline of each call


class InstantEngine(Engine):
    """Answers while it is asked."""

    name = "instant"
    max_batch_size = 1024

    async def start(self) -> None:
        pass

    def add_request(self, request: Request, sink: Sink) -> None:
        sink(Delta("answer", [1], finish_reason="stop", usage=Usage(1, 1)))


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Threadsafe(LoopThread):
    """asyncio's own way from a thread to a loop."""

    async def _answer(self, prompt: str) -> str:
        return "answer"

    def ask(self, prompt: str) -> str:
        return asyncio.run_coroutine_threadsafe(self._answer(prompt), self.loop).result(LIMIT)


class Polled(LoopThread):
    """A queue in and a queue out for each thread; a task per thread polls the queue in."""

    def __init__(self, clients: int) -> None:
        super().__init__()
        self._pairs: list[tuple[queue.Queue[str], queue.Queue[str]]] = []
        self._own = threading.local()
        self._numbers = itertools.count()
        for _ in range(clients):
            self._pairs.append((queue.Queue(), queue.Queue()))
            asyncio.run_coroutine_threadsafe(self._serve(*self._pairs[-1]), self.loop)

    async def _serve(self, inbox: queue.Queue[str], outbox: queue.Queue[str]) -> None:
        while True:
            if inbox.empty():
                await asyncio.sleep(0)
            else:
                inbox.get()
                outbox.put("answer")

    def ask(self, prompt: str) -> str:
        if not hasattr(self._own, "pair"):  # a round's threads take them in turn
            self._own.pair = self._pairs[next(self._numbers) % len(self._pairs)]
        inbox, outbox = self._own.pair
        inbox.put(prompt)
        answer: str = outbox.get(timeout=LIMIT)
        return answer


@dataclass
class Result:
    """One round of one candidate."""

    calls_per_second: float
    cpu_per_1000: float
    median_us: float


def run(ask: Callable[[str], str], threads: int, seconds: float) -> Result:
    """``threads`` threads call ``ask`` one call after another until the time is up."""
    latencies: list[list[float]] = [[] for _ in range(threads)]
    ready = threading.Barrier(threads + 1)

    def work(own: list[float]) -> None:
        ask("warm up")
        ready.wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            ask("What is 2 + 3?")
            own.append(time.perf_counter() - start)

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


def measure(threads: int, rounds: int, seconds: float) -> dict[str, list[Result]]:
    """All candidates in turn, the first one changing from round to round."""
    threadsafe = Threadsafe()
    results: dict[str, list[Result]] = {"bridge": [], "threadsafe": [], "polled": []}
    with Bridge(InstantEngine) as bridge:
        asks = {
            "bridge": lambda prompt: bridge.infer(prompt, timeout=LIMIT).text,
            "threadsafe": threadsafe.ask,
        }
        names = list(asks)
        for number in range(rounds):
            for name in names[number % 2 :] + names[: number % 2]:
                results[name].append(run(asks[name], threads, seconds))
    threadsafe.close()
    polled = Polled(threads)  # it burns a core even when idle, so it comes when the others have gone
    for _ in range(rounds):
        results["polled"].append(run(polled.ask, threads, seconds))
    polled.close()
    return results


def report(threads: int, results: dict[str, list[Result]]) -> None:
    base = results["threadsafe"]
    print(f"{threads} threads: medians, and in brackets the median ratio to threadsafe")
    for name, rounds in results.items():
        columns = []
        for field in ("calls_per_second", "cpu_per_1000", "median_us"):
            values = [getattr(result, field) for result in rounds]
            ratio = statistics.median(v / getattr(b, field) for v, b in zip(values, base, strict=True))
            columns.append(f"{statistics.median(values):10.3f} ({ratio:5.2f})")
        print(f"  {name:<11} calls/s {columns[0]}   CPU s/1000 {columns[1]}   p50 us {columns[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", default="1,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    for threads in map(int, arguments.threads.split(",")):
        report(threads, measure(threads, arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
