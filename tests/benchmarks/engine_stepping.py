"""Where transformers' manager should run: on a thread of its own, as the engine has it, or step by step on the loop.

- thread: the engine as it is
- loop: the same engine, whose steps are callbacks of the server's loop. Nothing is handed over, and nothing else
  happens on the loop while a step runs

Both behind a bridge in one process, in turn, with ``infer`` and ``stream``; medians of the rounds and the ratio within
each. Then what a caller feels of an abort, and what happens when a step hangs.

Run: ``python -m tests.benchmarks.engine_stepping [--clients 1,32] [--rounds 7] [--hidden 512] [--threads 1]``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lmbridge import Bridge, Delta, LMBridgeError, Request
from lmbridge.engines.transformers import TransformersEngine, continuous
from lmbridge.engines.transformers.continuous import Core
from tests.benchmarks.engine_models import model_folder


class Idle:
    """Stands in for the manager's wake-up event: instead of waiting for a request, note that there is none."""

    def __init__(self) -> None:
        self.resting = False

    def wait(self, timeout: float | None = None) -> bool:
        self.resting = True
        return True

    def set(self) -> None:
        pass

    clear = set


class LoopEngine(TransformersEngine):
    """Steps on the loop. It leans on four private names of transformers' manager."""

    async def start(self) -> None:
        await super().start()
        assert self._core is not None
        self._core.halt(10.0)  # the thread that start() gave it
        self._manager: Any = self._core._manager
        self._manager.background_thread_status.clear()
        self._idle = self._manager._wake_up_loop = Idle()
        self._processor = self._manager._create_batch_processor()
        self._manager.batch_processor = self._processor
        self._manager.current_batch = 0
        self._scheduled = False
        continuous._use_threads(continuous._thread_count(self._core._model, self._options))

    def _tell(self, method: Any, *args: Any) -> None:
        if method == self._on_end and not self._requests:  # the thread's end, in start()
            return
        if hasattr(self, "_idle"):
            method(*args)

    def add_request(self, request: Request, sink: Callable[[Delta], None]) -> None:
        super().add_request(request, sink)
        self._step_soon()

    def abort_request(self, request_id: str) -> None:
        super().abort_request(request_id)
        self._step_soon()

    def _step_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._scheduled = self._idle.resting = False
        if self._closed or self._dead is not None:
            return
        with torch.inference_mode():
            self._manager._generation_loop_body(self._processor, False)
        if not self._idle.resting:
            self._step_soon()


ENGINES: dict[str, type[TransformersEngine]] = {"thread": TransformersEngine, "loop": LoopEngine}


def ask(bridge: Bridge, verb: str, clients: int, tokens: int) -> float:
    """Seconds for as many threads as clients to get an answer each."""

    def one(number: int) -> None:
        answer = getattr(bridge, verb)(f"Tell me story {number}.", max_new_tokens=tokens, ignore_eos=True)
        if verb == "stream":
            for _ in answer:
                pass

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        list(pool.map(one, range(clients)))
        return time.perf_counter() - start


def compare(bridges: dict[str, Bridge], clients: int, verb: str, tokens: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in bridges}
    for number in range(-1, rounds):
        for name in list(bridges)[:: 1 if number % 2 else -1]:
            seconds[name].append(ask(bridges[name], verb, clients, tokens))
    rates = {name: clients * tokens / statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [thread / loop for thread, loop in zip(seconds["thread"][1:], seconds["loop"][1:], strict=True)]
    print(
        f"{clients:3} clients, {verb:<6}: thread {rates['thread']:7.0f} tokens/s, loop {rates['loop']:7.0f}; "
        f"loop/thread {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
    )


def time_aborts(bridge: Bridge, crowd: int, tries: int = 20) -> tuple[float, float]:
    """Milliseconds from ``Stream.close()`` until the engine has let go, among others; median and most."""
    others = ThreadPoolExecutor(crowd)
    left = threading.Event()

    def go_on(number: int) -> None:
        while not left.is_set():
            bridge.infer(f"Story {number}.", max_new_tokens=50, ignore_eos=True)

    futures = [others.submit(go_on, number) for number in range(crowd)]
    found = []
    for number in range(tries):
        stream = bridge.stream(f"Tell me story {number}.", max_new_tokens=900, ignore_eos=True)
        key = stream.request_id
        next(iter(stream))
        start = time.perf_counter()
        stream.close()
        while any(info.id == key for info in bridge.requests()):
            time.sleep(0.0002)
        found.append(1000 * (time.perf_counter() - start))
    left.set()
    for future in futures:
        future.result()
    others.shutdown()
    return statistics.median(found), max(found)


def hang(model: str, engine: type[TransformersEngine]) -> None:
    """A step that never returns: what one inside, one waiting and one coming later see."""
    bridge = Bridge(functools.partial(engine, model), stall_timeout=2.0)
    with bridge:
        bridge.infer("Hello", max_new_tokens=2)
        release = threading.Event()
        core = _core_of(bridge)
        forward = core._model.forward
        core._model.forward = lambda *args, **kwargs: (release.wait(60), forward(*args, **kwargs))[1]
        start = time.perf_counter()
        outcomes: list[str] = []

        def call(name: str, timeout: float | None) -> None:
            try:
                bridge.infer("Tell me a story.", max_new_tokens=4, timeout=timeout)
                outcome = "answered"
            except LMBridgeError as error:
                outcome = type(error).__name__
            outcomes.append(f"{name}: {outcome} after {time.perf_counter() - start:.1f} s")

        threads = [
            threading.Thread(target=call, args=arguments) for arguments in (("inside", None), ("deadline 1 s", 1.0))
        ]
        threads[0].start()
        time.sleep(0.3)
        threads[1].start()
        time.sleep(0.2)
        threads.append(threading.Thread(target=call, args=("came while it hung", None)))
        threads[2].start()
        for thread in threads:
            thread.join(60)
        print(f"  {'; '.join(outcomes)}; {bridge.state}; threads {sorted(t.name for t in threading.enumerate())}")
        release.set()


def _core_of(bridge: Bridge) -> Core:
    server = bridge._host.running()
    assert server is not None
    assert server.seat is not None
    engine = server.seat.engine
    assert isinstance(engine, TransformersEngine)
    assert engine._core is not None
    return engine._core


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", default="1,32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=0, help="a random model of this width instead of the bundled one")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 for torch's own choice")
    parser.add_argument("--skip-hang", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(model_folder(arguments.hidden, arguments.layers))
        bridges = {
            name: stack.enter_context(Bridge(functools.partial(engine, model))) for name, engine in ENGINES.items()
        }
        for clients in map(int, arguments.clients.split(",")):
            for verb in ("infer", "stream"):
                compare(bridges, clients, verb, arguments.tokens, arguments.rounds)
        for name, bridge in bridges.items():
            print("abort, {}: median {:.1f} ms, most {:.1f} ms".format(name, *time_aborts(bridge, 16)))
        if not arguments.skip_hang:
            for name, engine in ENGINES.items():
                print(f"a step hangs, {name} (stall_timeout 2 s):")
                hang(model, engine)


if __name__ == "__main__":
    main()
