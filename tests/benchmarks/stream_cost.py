"""What it costs to bring each token to the thread that reads it: an engine that makes one token a client and step.

Ways, in turn:

- native: the readers are tasks on the engine's own loop, and nobody crosses threads
- bridge: each thread reads ``bridge.stream``
- queue put: the loop puts each token into the thread's own ``queue.Queue``, as LMDeploy's Pipeline does
- janus put: it awaits the put into the thread's own janus queue
- threadsafe: each thread asks for each token by ``run_coroutine_threadsafe``

Steps a second that the engine reached, CPU microseconds of the process for each token, tokens a second until the last
reader had its last one, and the 99th percentile of the time between two readings of a thread.

Run: ``python -m tests.benchmarks.stream_cost [--threads 64] [--step-ms 1] [--tokens 500] [--rounds 5]``; without
arguments: 64 threads at 10, 1 and 0 ms and 256 threads at 1 ms
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass

import janus

from lmbridge import Bridge, Delta, Engine, GenerationConfig, Request
from lmbridge.engines.base import Sink
from tests.benchmarks.measure import interleave, print_table
from tests.benchmarks.peers import loop_thread

_ids = itertools.count()
Read = Callable[[int], Iterator[Delta]]


class SteppingEngine(Engine):
    """One token for each request and step; steps begin ``step`` seconds apart, or as fast as they can."""

    name = "stepping"
    max_batch_size = 1024

    def __init__(self, step: float) -> None:
        self.steps = 0
        self._step = step
        self._left: dict[str, int] = {}
        self._sinks: dict[str, Sink] = {}
        self._due = 0.0

    async def start(self) -> None:
        pass

    def add_request(self, request: Request, sink: Sink) -> None:
        loop = asyncio.get_running_loop()
        if not self._left:
            self._due = loop.time() + self._step
            loop.call_at(self._due, self._make_step, loop)
        self._left[request.id] = request.config.max_new_tokens
        self._sinks[request.id] = sink

    def _make_step(self, loop: asyncio.AbstractEventLoop) -> None:
        self.steps += 1
        for request_id, left in list(self._left.items()):
            if left > 1:
                self._left[request_id] = left - 1
                self._sinks[request_id](Delta("token ", [7]))
            else:
                del self._left[request_id]
                self._sinks.pop(request_id)(Delta("token ", [7], finish_reason="length"))
        if not self._left:
            return
        self._due = max(self._due + self._step, loop.time())
        if self._step:
            loop.call_at(self._due, self._make_step, loop)
        else:
            loop.call_soon(self._make_step, loop)


@dataclass
class Result:
    """One round of one way."""

    steps_per_s: float
    cpu_us_per_token: float
    tokens_per_s: float
    p99_gap_ms: float


def new_request(tokens: int) -> Request:
    config, now = GenerationConfig(max_new_tokens=tokens), time.monotonic()
    return Request(f"r{next(_ids)}", "prompt", config, False, "client", 0, None, now, copy_context())


def native(clients: int, step: float, tokens: int) -> Result:
    """Tasks instead of threads."""

    async def read(engine: SteppingEngine) -> list[float]:
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        engine.add_request(new_request(tokens), deltas.put_nowait)
        times = []
        while (await deltas.get()).finish_reason is None:
            times.append(time.perf_counter())
        return times

    async def run() -> Result:
        engine = SteppingEngine(step)
        start, cpu = time.perf_counter(), time.process_time()
        times = await asyncio.gather(*(read(engine) for _ in range(clients)))
        return _result(engine.steps, start, cpu, times, clients * tokens)

    return asyncio.run(run())


def in_threads(
    opened: Callable[[SteppingEngine], AbstractContextManager[Read]], clients: int, step: float, tokens: int
) -> Result:
    """Each thread reads one stream."""
    engine = SteppingEngine(step)
    times: list[list[float]] = [[] for _ in range(clients)]
    counts = [0] * clients
    ready = threading.Barrier(clients + 1)

    def work(number: int) -> None:
        ready.wait()
        for delta in read(tokens):
            times[number].append(time.perf_counter())
            counts[number] += len(delta.token_ids)

    with opened(engine) as read:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for worker in workers:
            worker.start()
        ready.wait()
        start, cpu = time.perf_counter(), time.process_time()
        for worker in workers:
            worker.join()
        result = _result(engine.steps, start, cpu, times, clients * tokens)
    if counts != [tokens] * clients:
        raise RuntimeError("Tokens were lost on the way.")
    return result


def _result(steps: int, start: float, cpu: float, times: list[list[float]], tokens: int) -> Result:
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    gaps = sorted(later - earlier for own in times for earlier, later in itertools.pairwise(own))
    p99 = gaps[int(len(gaps) * 0.99)] if gaps else 0.0
    return Result(steps / elapsed, cpu / tokens * 1e6, tokens / elapsed, p99 * 1e3)


@contextlib.contextmanager
def bridge(engine: SteppingEngine) -> Iterator[Read]:
    with Bridge(engine) as opened:
        yield lambda tokens: iter(opened.stream("prompt", max_new_tokens=tokens, timeout=120))


@contextlib.contextmanager
def queue_put(engine: SteppingEngine) -> Iterator[Read]:
    with loop_thread() as loop:

        def read(tokens: int) -> Iterator[Delta]:
            deltas: queue.Queue[Delta] = queue.Queue()
            loop.call_soon_threadsafe(engine.add_request, new_request(tokens), deltas.put)
            return _until_end(deltas.get)

        yield read


@contextlib.contextmanager
def janus_put(engine: SteppingEngine) -> Iterator[Read]:
    async def pump(source: asyncio.Queue[Delta], deltas: janus.Queue[Delta]) -> None:
        while True:
            delta = await source.get()
            await deltas.async_q.put(delta)
            if delta.finish_reason is not None:
                return

    with loop_thread() as loop:

        def read(tokens: int) -> Iterator[Delta]:
            source, deltas = _request_on(loop, engine, tokens), janus.Queue[Delta]()
            asyncio.run_coroutine_threadsafe(pump(source, deltas), loop)
            return _until_end(deltas.sync_q.get)

        yield read


@contextlib.contextmanager
def threadsafe(engine: SteppingEngine) -> Iterator[Read]:
    with loop_thread() as loop:

        def read(tokens: int) -> Iterator[Delta]:
            source = _request_on(loop, engine, tokens)
            return _until_end(lambda: _ask(source.get(), loop))

        yield read


def _ask(coroutine: Awaitable[Delta], loop: asyncio.AbstractEventLoop) -> Delta:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()  # type: ignore[arg-type]


def _request_on(loop: asyncio.AbstractEventLoop, engine: SteppingEngine, tokens: int) -> asyncio.Queue[Delta]:
    """A request begun on the loop, and the queue there that gets its deltas."""
    source: asyncio.Queue[Delta] = asyncio.Queue()
    loop.call_soon_threadsafe(engine.add_request, new_request(tokens), source.put_nowait)
    return source


def _until_end(get: Callable[[], Delta]) -> Iterator[Delta]:
    while True:
        delta = get()
        yield delta
        if delta.finish_reason is not None:
            return


WAYS = {"bridge": bridge, "queue put": queue_put, "janus put": janus_put, "threadsafe": threadsafe}


def compare(clients: int, step: float, tokens: int, rounds: int) -> None:
    """Measure and print one table."""

    def candidate(opened: Callable[[SteppingEngine], AbstractContextManager[Read]]) -> Callable[[], Result]:
        return lambda: in_threads(opened, clients, step, tokens)

    candidates: dict[str, Callable[[], Result]] = {"native": lambda: native(clients, step, tokens)}
    candidates |= {name: candidate(opened) for name, opened in WAYS.items()}
    results = interleave(candidates, rounds)
    print_table(f"Streams: {clients} readers, a step of {step * 1e3:g} ms (in brackets: to native)", results, "native")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.threads:
        compare(arguments.threads, arguments.step_ms / 1e3, arguments.tokens, arguments.rounds)
        return
    for clients, step, tokens in ((64, 0.01, 150), (64, 0.001, 500), (256, 0.001, 200), (64, 0.0, 1000)):
        compare(clients, step, tokens, arguments.rounds)


if __name__ == "__main__":
    main()
