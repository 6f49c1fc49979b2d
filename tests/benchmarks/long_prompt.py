"""What somebody's 4 MB prompt does to eight callers of short ones, and how soon its own caller is told.

In turn: no such prompt; one for the bundled model, where its length alone refuses it; one for the same model with a
tokenizer whose texts' lengths tell nothing, so that it is tokenised first; and that with a deadline of 0.2 s. All the
while the eight ask one question after another, and a thread that sleeps a millisecond at a time notes how late it
wakes, for what holds the GIL holds it up.

Run: ``python -m tests.benchmarks.long_prompt [--characters 4000000] [--callers 8] [--rounds 5]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lmbridge import Bridge
from lmbridge.engines.models import find_model
from lmbridge.errors import PromptTooLongError, RequestTimeoutError
from tests.benchmarks.measure import interleave, print_table


@dataclass
class Result:
    """One round: the short calls' times, how late the latest wake-up was, and the time to the long prompt's error."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    latest_wake_ms: float
    refused_ms: float


class Repeating:
    """A thread that calls ``work`` until the end and keeps what it returns."""

    def __init__(self, work: Callable[[], float]) -> None:
        self._work = work
        self._ended = threading.Event()
        self.values: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.values.append(self._work())

    def end(self) -> None:
        self._ended.set()

    def join(self) -> list[float]:
        self._thread.join()
        return self.values


def late() -> float:
    """Seconds that a wake-up comes late."""
    start = time.perf_counter()
    time.sleep(0.001)
    return time.perf_counter() - start - 0.001


def ask(bridge: Bridge) -> float:
    """Seconds of a short call."""
    start = time.perf_counter()
    bridge.infer("What is 2 + 3?", max_new_tokens=4)
    return time.perf_counter() - start


def refusal(bridge: Bridge, prompt: str, timeout: float) -> float:
    """Seconds until the long prompt has its error."""
    start = time.perf_counter()
    with contextlib.suppress(PromptTooLongError, RequestTimeoutError):
        bridge.infer(prompt, max_new_tokens=4, timeout=timeout)
        raise AssertionError("the long prompt was answered")
    return time.perf_counter() - start


def one_round(bridge: Bridge, callers: int, seconds: float, long: Callable[[], float] | None) -> Result:
    """The callers ask for so many seconds, and as long as the long prompt takes."""
    others = [Repeating(partial(ask, bridge)) for _ in range(callers)]
    clock = Repeating(late)
    refused = 0.0
    end = time.perf_counter() + seconds
    time.sleep(seconds / 4)
    if long is not None:
        refused = long()
    time.sleep(max(0.0, end - time.perf_counter()))
    for thread in [*others, clock]:
        thread.end()
    calls = sorted(value for other in others for value in other.join())
    p99 = calls[len(calls) * 99 // 100]
    return Result(
        1000 * statistics.median(calls), 1000 * p99, 1000 * calls[-1], 1000 * max(clock.join()), 1000 * refused
    )


@contextlib.contextmanager
def without_a_bound() -> Iterator[str]:
    """The bundled model with a tokenizer that drops white space at both ends, so that no length tells anything."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(find_model("demo"), folder, dirs_exist_ok=True)
        file = Path(folder, "tokenizer.json")
        tokenizer = json.loads(file.read_text("utf-8"))
        tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
        file.write_text(json.dumps(tokenizer), "utf-8")
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--characters", type=int, default=4_000_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prompt = "a " * (arguments.characters // 2)
    with without_a_bound() as folder, Bridge("demo") as bounded, Bridge(folder) as unbounded:
        for bridge in (bounded, unbounded):
            bridge.infer("warm up", max_new_tokens=4)

        def candidate(bridge: Bridge, timeout: float | None) -> Callable[[], Result]:
            long = None if timeout is None else partial(refusal, bridge, prompt, timeout)
            return partial(one_round, bridge, arguments.callers, arguments.seconds, long)

        candidates = {
            "none": candidate(bounded, None),
            "refused by its length": candidate(bounded, 60),
            "tokenised, then refused": candidate(unbounded, 60),
            "tokenised, deadline 0.2 s": candidate(unbounded, 0.2),
        }
        results = interleave(candidates, arguments.rounds)
    size = f"{arguments.characters / 1e6:g} million characters"
    print_table(
        f"{arguments.callers} callers of short prompts beside one of {size} (in brackets: to none)", results, "none"
    )


if __name__ == "__main__":
    main()
