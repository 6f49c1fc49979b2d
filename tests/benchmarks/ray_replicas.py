"""What replicas on this machine give, and what the way to them costs: the bundled model here, and on replicas.

In each round every candidate answers the same prompts, asked by as many threads; the candidates take turns, and ratios
are taken within a round. ``wait`` is a model that computes elsewhere: its replicas wait, as for a GPU, so that this
machine's processors are not what is shared.

Run: ``python -m tests.benchmarks.ray_replicas [--threads 16] [--requests 64] [--rounds 5] [--replicas 1,2]``, with
``lmbridge[ray]`` installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import statistics
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lmbridge import Bridge, Delta, Engine, Request
from lmbridge.engines.ray import RayEngine
from lmbridge.engines.transformers import TransformersEngine
from tests.benchmarks.measure import interleave, print_table

TOKENS = 48
STEP = 0.02


class Waiting(Engine):
    """A model whose steps take a while and no processor."""

    name = "wait"

    def __init__(self, model: str, *, max_batch_size: int = 8) -> None:
        self.max_batch_size = max_batch_size

    async def start(self) -> None:
        """Nothing is loaded."""

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        for number in range(request.config.max_new_tokens):
            await asyncio.sleep(STEP)
            yield Delta("word ", [number])
        yield Delta(finish_reason="length")


@dataclass
class Figures:
    """Of one round."""

    tokens_per_s: float
    first_token_ms: float
    gap_ms: float


def one_round(bridge: Bridge, threads: int, requests: int) -> Figures:
    """Ask everything, and note when each token came."""

    def ask(number: int) -> list[float]:
        times = [time.perf_counter()]
        options: dict[str, Any] = {"max_new_tokens": TOKENS}
        if "ignore_eos" in bridge.supports():
            options["ignore_eos"] = True
        times.extend(time.perf_counter() for _ in bridge.stream(f"Tell me a story of {number}.", **options))
        return times

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        times = list(pool.map(ask, range(requests)))
    seconds = time.perf_counter() - begin
    firsts = [stream[1] - stream[0] for stream in times]
    gaps = [(stream[-1] - stream[1]) / (TOKENS - 1) for stream in times]
    return Figures(requests * TOKENS / seconds, 1000 * statistics.median(firsts), 1000 * statistics.median(gaps))


def compare(title: str, builders: dict[str, Callable[[], Engine]], options: argparse.Namespace) -> None:
    """A table of the candidates, all of them loaded before the first round."""
    with contextlib.ExitStack() as open_ones:
        bridges = {name: open_ones.enter_context(Bridge(build)) for name, build in builders.items()}
        rounds = {
            name: functools.partial(one_round, bridge, options.threads, options.requests)
            for name, bridge in bridges.items()
        }
        for warm_up in rounds.values():
            warm_up()
        print_table(title, interleave(rounds, options.rounds), next(iter(rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replicas", default="1,2")
    options = parser.parse_args()
    counts = [int(count) for count in options.replicas.split(",")]
    cores: dict[str, Any] = {"num_cpus": 0.5, "max_batch_size": 8}
    compare(
        "the bundled model",
        {"in this process": lambda: TransformersEngine("demo", max_batch_size=8)}
        | {f"{n} on Ray": functools.partial(RayEngine, "demo", replicas=n, **cores) for n in counts},
        options,
    )
    compare(
        f"a model that computes elsewhere, {1000 * STEP:g} ms a token",
        {"in this process": lambda: Waiting("", max_batch_size=8)}
        | {f"{n} on Ray": functools.partial(RayEngine, "", inner_engine=Waiting, replicas=n, **cores) for n in counts},
        options,
    )


if __name__ == "__main__":
    main()
