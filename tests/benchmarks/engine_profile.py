"""Where a step of the transformers engine spends its time, and how much of it is ours.

Threads ask for answers of equal length through a bridge, so that every step but the first few serves all of them. The
functions a token passes are wrapped from here; each is charged with its own time, without that of the wrapped ones
inside. Two clocks: on the generation thread the wall clock, whose parts add up to a step; elsewhere the thread's CPU
time, since that work runs beside the step. Of the rounds, the one whose step is the median.

The table at the end has the sampler's share of a step beside what is aimed at, by both clocks: of a machine that others
use too, the generation thread's CPU time tells more.

Private functions of transformers are watched, none is replaced: a release that renames one ends this with an
``AttributeError``. On a GPU the times are those of launching work, not of the work.

Run: ``python -m tests.benchmarks.engine_profile [--clients 1,8,32,64] [--model demo | --hidden 512 --layers 8]
[--sampling greedy,temperature,top_p,top_k,stop_words,logprobs] [--verb infer] [--options page_size=64] [--threads 1]``
The sampler's share: ``--clients 32 --verb infer --sampling greedy,top_p,temperature,top_k``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner

from lmbridge import Bridge, GenerationConfig
from lmbridge.engines.text import TextStream
from lmbridge.engines.transformers import attention
from lmbridge.engines.transformers.paged import PagedRunner
from lmbridge.engines.transformers.processor import _Processors
from lmbridge.engines.transformers.runner import Witness
from lmbridge.server.calls import Calls
from tests.benchmarks.engine_models import model_folder

STEP = "the rest of the loop"
WAIT = "waiting for requests"
FORWARD = "model forward"
ATTENTION = "lmbridge's attention (in the forward)"
SAMPLER, WITNESS, HAND_OVER = "ours: sampler", "ours: witness", "ours: hand-over"
GENERATION = [
    FORWARD,
    ATTENTION,
    "transformers: schedule, prepare",
    "transformers: argmax",
    "transformers: update",
    STEP,
    SAMPLER,
    WITNESS,
    HAND_OVER,
]
SERVER = ["ours: outputs to deltas", "ours: detokenising", "ours: sinks (bridge)", "ours: rest of the loop"]
CALLERS = "ours: callers' threads"
CONFIGS = {
    "greedy": GenerationConfig(),
    "temperature": GenerationConfig(temperature=0.8, random_seed=1),
    "top_p": GenerationConfig(temperature=0.8, top_p=0.95, random_seed=1),
    "top_k": GenerationConfig(temperature=0.8, top_k=50, random_seed=1),
    "top_k_top_p": GenerationConfig(temperature=0.8, top_p=0.95, top_k=50, random_seed=1),
    "min_p": GenerationConfig(temperature=0.8, min_p=0.05, random_seed=1),
    "penalty": GenerationConfig(repetition_penalty=1.2),
    "stop_words": GenerationConfig(stop_words=["\n\nUser:", "###"]),
    "logprobs": GenerationConfig(logprobs=5),
}
AIMS = {"greedy": 3.0, "temperature": 8.0, "top_p": 8.0, "top_k": 8.0}
"""The most of a step, in per cent, that the sampler should take at 32 rows of the bundled model."""


class Clock:
    """Seconds by part, each without the parts inside it, and calls. Threads keep apart."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.whole: defaultdict[str, float] = defaultdict(float)  # CPU with the parts inside
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._toll = self._outside = 0.0
        self._weigh()

    def reset(self) -> None:
        for counts in (self.wall, self.cpu, self.whole, self.calls):
            counts.clear()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``function``, with ``name`` charged for what it takes."""
        local = self._local

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            try:
                stack = local.stack
            except AttributeError:
                stack = local.stack = []
            stack.append([0.0, 0.0])
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
                inside = stack.pop()
                self.wall[name] += wall - inside[0]
                self.cpu[name] += cpu - inside[1] - self._toll
                self.whole[name] += cpu
                self.calls[name] += 1
                if stack:
                    stack[-1][0] += wall
                    stack[-1][1] += cpu + self._outside

        return timed

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Charge ``name`` with what ``owner.attribute`` takes."""
        setattr(owner, attribute, self.timed(getattr(owner, attribute), name))

    def _weigh(self, calls: int = 20_000) -> None:
        """What the measuring itself adds to a part, and to the part around it."""
        inner = self.timed(lambda: None, "inner")
        start = time.thread_time()
        self.timed(lambda: [inner() for _ in range(calls)], "outer")()
        total = time.thread_time() - start
        self._toll = self.cpu["inner"] / calls
        self._outside = total / calls - self._toll
        self.reset()


def watch(clock: Clock) -> None:
    """Wrap every function that a token passes. Before the engine starts: it keeps some of them bound."""
    for owner, attribute, name in (
        (ContinuousBatchingManager, "_generation_loop_body", STEP),
        (LlamaForCausalLM, "forward", FORWARD),
        (attention, "segment_attention", ATTENTION),
        (ContinuousBatchProcessor, "prepare_next_batch", GENERATION[2]),
        (ModelRunner, "_sample", GENERATION[3]),
        (ContinuousBatchProcessor, "update_batch", GENERATION[4]),
        (_Processors, "prepare_tensor_args", SAMPLER),
        (_Processors, "__call__", SAMPLER),
        (Witness, "_enter", WITNESS),
        (Witness, "_leave", WITNESS),
        (OutputRouter, "deliver_batch", HAND_OVER),
        (threading.Event, "wait", WAIT),
        (PagedRunner, "_deliver", SERVER[0]),
        (TextStream, "push", SERVER[1]),
        (TextStream, "finish", SERVER[1]),
        (Calls, "_on_delta", SERVER[2]),
    ):
        clock.wrap(owner, attribute, name)


class Load:
    """As many threads as clients, each asking for one answer, and what that cost."""

    def __init__(self, bridge: Bridge, clock: Clock, tokens: int, verb: str) -> None:
        self._bridge = bridge
        self._clock = clock
        self._tokens = tokens
        self._verb = verb

    def run(self, clients: int, config: GenerationConfig) -> dict[str, float]:
        """Milliseconds a step, by part; ``steps`` and ``tokens/s`` beside them."""
        start_line = threading.Barrier(clients + 1)

        def read(number: int) -> float:
            start_line.wait()
            start = time.thread_time()
            overrides = {"max_new_tokens": self._tokens, "ignore_eos": True}
            answer = getattr(self._bridge, self._verb)(f"Tell me story {number}.", config, **overrides)
            if self._verb == "stream":
                for _ in answer:
                    pass
            return time.thread_time() - start

        with ThreadPoolExecutor(clients) as pool:
            readers = [pool.submit(read, number) for number in range(clients)]
            self._clock.reset()
            before = self._server_time()
            start_line.wait()
            start = time.perf_counter()
            callers = sum(reader.result() for reader in readers)
            seconds = time.perf_counter() - start
            server = self._server_time() - before
        return self._split(seconds, server, callers, clients)

    def _split(self, seconds: float, server: float, callers: float, clients: int) -> dict[str, float]:
        clock = self._clock
        steps = clock.calls[FORWARD]
        parts = {name: clock.wall[name] for name in GENERATION}
        parts["step"] = sum(parts.values())
        parts |= {name: clock.cpu[name] for name in SERVER}
        parts[SERVER[-1]] = server - clock.whole[SERVER[0]]
        parts[CALLERS] = callers
        parts |= {_cpu(name): clock.cpu[name] for name in GENERATION}
        parts = {name: 1000 * value / steps for name, value in parts.items()}
        return parts | {"steps": steps, "tokens/s": clients * self._tokens / seconds}

    def _server_time(self) -> float:
        """The CPU time of the server thread so far."""
        found: list[float] = []
        told = threading.Event()

        def tell() -> None:
            found.append(time.thread_time())
            told.set()

        server = self._bridge._server_thread.handle
        server.run_soon(tell)
        told.wait(30)
        return found[0]


def show(title: str, rounds: list[dict[str, float]]) -> None:
    """One table: each part in milliseconds a step and in per cent of the step."""
    median = sorted(rounds, key=lambda result: result["step"])[len(rounds) // 2]
    step = median["step"]
    print(f"\n{title}: {median['tokens/s']:.0f} tokens/s, {median['steps']:.0f} steps of {step:.2f} ms")
    for heading, names in (("generation thread, wall", GENERATION), ("beside it, CPU", [*SERVER, CALLERS])):
        print(f"  {heading}")
        for name in names:
            print(f"    {name:<38} {median[name]:8.3f} ms {100 * median[name] / step:6.1f}%")


def sum_up(found: dict[tuple[int, str], list[dict[str, float]]]) -> None:
    """What of a step is ours, in per cent: medians of the rounds, for the sampler the least and most too, and the aim.

    The sampler holds up the step, as the hand-over and the witness do; the rest of ours is beside it.
    """
    heading = f"{'clients':>7} {'sampling':<12} {'step ms':>8} {'sampler %':>20} {'of CPU %':>20} {'aim':>5}"
    print(f"\n{heading} {'rest of ours %':>15} {'callers %':>10}")
    for (clients, sampling), rounds in found.items():
        step = statistics.median(result["step"] for result in rounds)
        cells = [_spread(_share(result, SAMPLER) for result in rounds), _spread(map(_share_of_cpu, rounds))]
        aim = f"{AIMS[sampling]:g}" if clients == 32 and sampling in AIMS else "-"
        rest = statistics.median(_share(result, *SERVER, WITNESS, HAND_OVER) for result in rounds)
        callers = statistics.median(_share(result, CALLERS) for result in rounds)
        shares = f"{cells[0]:>20} {cells[1]:>20} {aim:>5} {rest:15.1f} {callers:10.1f}"
        print(f"{clients:>7} {sampling:<12} {step:8.2f} {shares}")


def _share(result: dict[str, float], *names: str) -> float:
    """Per cent of the step, on the clock."""
    return 100 * sum(result[name] for name in names) / result["step"]


def _share_of_cpu(result: dict[str, float]) -> float:
    """The sampler's part of the generation thread's CPU time, in per cent."""
    return 100 * result[_cpu(SAMPLER)] / sum(result[_cpu(name)] for name in GENERATION)


def _cpu(name: str) -> str:
    return f"{name}, CPU"


def _spread(shares: Iterable[float]) -> str:
    values = list(shares)
    return f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--hidden", type=int, default=0, help="a random model of this width instead")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sampling", default="greedy", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--verb", choices=["stream", "infer"], default="stream")
    parser.add_argument("--options", default="", help="of the engine, as name=number,name=number")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 for torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Clock()
    watch(clock)
    with contextlib.ExitStack() as stack:
        model = arguments.model
        if arguments.hidden:
            model = stack.enter_context(model_folder(arguments.hidden, arguments.layers))
        options: dict[str, Any] = dict(pair.split("=") for pair in arguments.options.split(",") if pair)
        options = {name: int(value) for name, value in options.items()}
        bridge = stack.enter_context(Bridge(model, runner="paged", **options))
        load = Load(bridge, clock, arguments.tokens, arguments.verb)
        print(f"{bridge!r}, {torch.get_num_threads()} torch threads")
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for sampling in arguments.sampling.split(","):
            for clients in map(int, arguments.clients.split(",")):
                load.run(clients, CONFIGS[sampling])
                rounds = [load.run(clients, CONFIGS[sampling]) for _ in range(arguments.rounds)]
                show(f"{clients} clients, {sampling}", rounds)
                found[clients, sampling] = rounds
        sum_up(found)


if __name__ == "__main__":
    main()
