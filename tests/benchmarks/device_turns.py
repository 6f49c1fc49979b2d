"""A stream of the bundled model beside a large embedding job on one device: alone, with turns and without.

The job embeds texts without end, in batches, by matrix products of the size that an encoder's have (``--embed MODEL``
takes a real one instead, by the encoder engine). Figures: the stream's time between tokens, and the job's texts a
second. What both give up together shows what turns cost: the shares of what each does alone add up to 1 at best, or a
little more, for the time in which the stream has nothing for the device to do.

Without turns each of the two has a device object of its own, so that neither knows of the other. Without pauses a turn
of the job is a whole batch, and not a layer of one; a real encoder's are as it makes them.

Run: ``python -m tests.benchmarks.device_turns [--seconds 5] [--rounds 5] [--embed MODEL] [--size 256]``
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lmbridge import Bridge, Device
from lmbridge.device.turns import Party, Turns
from tests.benchmarks.measure import interleave, print_table
from tests.device.embedding import Products

TEXT = "a text of some words that somebody would like to have as a vector"
PROMPT = "Write about the sea."


@dataclass
class Result:
    """The stream's milliseconds between tokens, its tokens a second, and the job's texts a second."""

    p50_ms: float = 0.0
    p99_ms: float = 0.0
    tokens_s: float = 0.0
    texts_s: float = 0.0


class Job:
    """Embeds on and on, from one thread, as many texts at a time as a list of a user's has."""

    def __init__(self, bridge: Bridge, embed: Callable[[Bridge, int], object]) -> None:
        self.texts = 0
        self._bridge, self._embed = bridge, embed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._began = time.perf_counter()
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._embed(self._bridge, 64)
            self.texts += 64

    def end(self) -> float:
        """Texts a second, those of the last list too."""
        self._ended.set()
        self._thread.join()
        return self.texts / (time.perf_counter() - self._began)


def stream(bridge: Bridge, seconds: float) -> Result:
    """Read answers for so long."""
    gaps: list[float] = []
    tokens, began = 0, time.perf_counter()
    end = began + seconds
    while time.perf_counter() < end:
        last = None
        with bridge.stream(PROMPT, max_new_tokens=200, ignore_eos=True) as reader:
            for delta in reader:
                now = time.perf_counter()
                tokens += len(delta.token_ids)
                if last is not None and delta.token_ids:
                    gaps.append((now - last) * 1000)
                last = now
                if now > end:
                    break
    gaps.sort()
    took = time.perf_counter() - began
    return Result(statistics.median(gaps), gaps[len(gaps) * 99 // 100], tokens / took)


def together(model: Bridge, encoder: Bridge, embed: Callable[[Bridge, int], object], seconds: float) -> Result:
    job = Job(encoder, embed)
    time.sleep(0.3)
    result = stream(model, seconds)
    result.texts_s = job.end()
    return result


def job_alone(encoder: Bridge, embed: Callable[[Bridge, int], object], seconds: float) -> Result:
    job = Job(encoder, embed)
    time.sleep(seconds)
    return Result(texts_s=job.end())


def cost_of_a_turn() -> float:
    """Microseconds, with nobody else there."""
    turns = Turns()
    party = Party(turns, turns.lane(1.0))
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(5_000):
            with party.turn():
                pass
        best = min(best, (time.perf_counter() - began) / 5_000)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--embed", help="a model for the encoder engine instead of matrix products")
    parser.add_argument("--size", type=int, default=256, help="of the products: the width of a model")
    parser.add_argument("--model", default="demo", help="that streams")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    seconds = arguments.seconds
    print(f"a turn with nobody else there: {cost_of_a_turn():.2f} microseconds")

    def encoder(device: Device, pauses: bool = True) -> Bridge:
        if arguments.embed:
            return Bridge(arguments.embed, "encoder", device=device)
        return Bridge(lambda: Products(arguments.size, arguments.device, pauses=pauses), device=device)

    def embed(bridge: Bridge, count: int) -> object:
        return bridge.embed([TEXT] * count) if arguments.embed else bridge.map([len(TEXT.split())] * count)

    shared = Device(arguments.device)
    with (
        Bridge(arguments.model, device=shared) as model,
        encoder(shared) as beside,
        encoder(shared, pauses=False) as whole,
        encoder(Device(arguments.device)) as apart,
    ):
        for bridge in (beside, whole, apart):
            embed(bridge, 64)
        model.infer(PROMPT, max_new_tokens=8)
        candidates = {
            "stream alone": partial(stream, model, seconds),
            "job alone": partial(job_alone, beside, embed, seconds),
            "with turns": partial(together, model, beside, embed, seconds),
            "without turns": partial(together, model, apart, embed, seconds),
        }
        if not arguments.embed:
            candidates["without pauses"] = partial(together, model, whole, embed, seconds)
        results = interleave(candidates, arguments.rounds)
        print_table("in brackets: to the stream alone", results, "stream alone")
        for name in [name for name in candidates if name.startswith("with")]:
            kept = [
                (beside.tokens_s / stream.tokens_s, beside.texts_s / job.texts_s)
                for beside, stream, job in zip(
                    results[name], results["stream alone"], results["job alone"], strict=True
                )
            ]
            tokens, texts = (statistics.median(values) for values in zip(*kept, strict=True))
            print(f"{name}: {tokens:.2f} of the stream's tokens/s, {texts:.2f} of the job's texts/s", flush=True)
        print(shared.status())


if __name__ == "__main__":
    main()
