"""What somebody's long prompt does to the others: the largest gap between two tokens of their streams while it is read.

For each chunk size: some streams run, a long prompt comes, and the gaps of the streams are compared with those before.
Medians of the rounds.

Run: ``python -m tests.benchmarks.engine_stall [--chunks 64,128,256,512,1024] [--streams 8] [--hidden 512]``
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from lmbridge import Bridge
from tests.benchmarks.engine_models import model_folder


class Streams:
    """Threads that read streams and note when each token came."""

    def __init__(self, bridge: Bridge, count: int, tokens: int) -> None:
        self._started = threading.Barrier(count + 1)
        self._pool = ThreadPoolExecutor(count)
        self._futures = [self._pool.submit(self._read, bridge, number, tokens) for number in range(count)]

    def _read(self, bridge: Bridge, number: int, tokens: int) -> list[float]:
        times = []
        for _ in bridge.stream(f"Story {number}.", max_new_tokens=tokens, ignore_eos=True):
            times.append(time.perf_counter())
            if len(times) == 10:
                self._started.wait()
        return times

    def running(self) -> None:
        """Return when each stream has ten tokens."""
        self._started.wait()

    def gaps(self, start: float, end: float) -> list[float]:
        """All gaps between two tokens of one stream, where the second came in this time."""
        found = [future.result() for future in self._futures]
        self._pool.shutdown()
        pairs = [pair for times in found for pair in itertools.pairwise(times)]
        return [after - before for before, after in pairs if start <= after <= end]


def one_round(bridge: Bridge, streams: int, prompt: int, number: int) -> tuple[float, float, float]:
    """Milliseconds: the usual gap, the largest one while the prompt is read, and until the prompt's first token."""
    crowd = Streams(bridge, streams, 120)
    crowd.running()
    start = time.perf_counter()
    long = [
        10 + (number * 31 + place * 7) % 2000 for place in range(prompt)
    ]  # shares no beginning with another round's
    next(iter(bridge.stream(long, max_new_tokens=2, ignore_eos=True)))
    end = time.perf_counter()
    reading, after = crowd.gaps(start, end), crowd.gaps(end, float("inf"))
    return 1000 * statistics.median(after), 1000 * max(reading), 1000 * (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chunks", default="64,128,256,512,1024")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=900, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=0, help="a random model of this width instead of the bundled one")
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    with model_folder(arguments.hidden, arguments.layers) as model:
        for chunk in map(int, arguments.chunks.split(",")):
            with Bridge(model, max_chunk_size=chunk) as bridge:
                rounds = [
                    one_round(bridge, arguments.streams, arguments.prompt, number)
                    for number in range(arguments.rounds + 1)
                ]
            usual, largest, first = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
            print(
                f"chunks of {chunk:5}: usual gap {usual:6.1f} ms, largest while reading {largest:6.1f} ms, "
                f"first token of the long prompt after {first:7.1f} ms"
            )


if __name__ == "__main__":
    main()
