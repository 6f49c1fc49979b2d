"""Single texts from many threads through one embedding model: the bridge beside the other ways, in one run.

Each way gives ``ask(text) -> vector`` for any number of threads. MiniLM, texts of 3 to 150 words or of one length; then
one caller alone; then single texts beside a list of thousands.

Run: ``python -m tests.benchmarks.encoder_speed [--rounds 5] [--threads 32] [--texts 640]`` (needs
sentence-transformers and ``batched``; the first run fetches the model). ``--infinity PYTHON`` adds infinity-emb from an
environment of its own, whose interpreter that is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmbridge import Bridge
from tests.benchmarks.measure import interleave, print_table
from tests.benchmarks.peers import loop_thread
from tests.real.minilm import minilm_folder

Ask = Callable[[str], Any]
Way = Callable[[], contextlib.AbstractContextManager[Ask]]

WORDS = [
    f"{part}{end}" for part in ("river", "engine", "garden", "letter", "window", "market") for end in ("", "s", " to")
]
WAIT, BATCH = 0.01, 32  # the recipe's


@dataclass
class Speed:
    """``texts_s``; ``p50_ms`` and ``p99_ms``: what a caller waits for one text."""

    texts_s: float
    p50_ms: float
    p99_ms: float


def mixed(count: int, seed: int = 1) -> list[str]:
    """Texts of 3 to 150 words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 150))) for _ in range(count)]


def even(count: int, seed: int = 1) -> list[str]:
    """Texts of 40 words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS[::3], k=40)) for _ in range(count)]


# --- the ways ---


@functools.cache
def sentence_transformer() -> Any:
    """The model as most people have it; all ways but the bridge share it, in turn."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_folder()), device="cpu")


@functools.cache
def bridge_of_minilm() -> Bridge:
    return Bridge(minilm_folder(), engine="encoder").start()


@contextlib.contextmanager
def bridge() -> Iterator[Ask]:
    """``bridge.embed``."""
    yield bridge_of_minilm().embed


@contextlib.contextmanager
def lock() -> Iterator[Ask]:
    """``model.encode`` behind a lock."""
    model, turn = sentence_transformer(), threading.Lock()

    def ask(text: str) -> Any:
        with turn:
            return model.encode(text, show_progress_bar=False)

    yield ask


@contextlib.contextmanager
def recipe() -> Iterator[Ask]:
    """An asyncio queue, batches of 32 that wait for 10 ms, ``encode`` on the loop."""
    model = sentence_transformer()

    async def serve(waiting: asyncio.Queue[tuple[str, asyncio.Future[Any]]]) -> None:
        while True:
            batch = [await waiting.get()]
            end = asyncio.get_running_loop().time() + WAIT
            while len(batch) < BATCH and (left := end - asyncio.get_running_loop().time()) > 0:
                with contextlib.suppress(TimeoutError):
                    batch.append(await asyncio.wait_for(waiting.get(), left))
            vectors = model.encode([text for text, _ in batch], batch_size=BATCH, show_progress_bar=False)
            for (_, future), vector in zip(batch, vectors, strict=True):
                future.set_result(vector)

    with loop_thread() as loop:
        waiting: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()
        serving = asyncio.run_coroutine_threadsafe(serve(waiting), loop)

        async def embed(text: str) -> Any:
            future = asyncio.get_running_loop().create_future()
            waiting.put_nowait((text, future))
            return await future

        yield lambda text: asyncio.run_coroutine_threadsafe(embed(text), loop).result(300)
        serving.cancel()


@contextlib.contextmanager
def batched() -> Iterator[Ask]:
    """The package of that name, its form for threads."""
    from batched import dynamically

    model = sentence_transformer()
    encode = dynamically(
        lambda texts: list(model.encode(texts, batch_size=BATCH, show_progress_bar=False)),
        batch_size=BATCH,
        timeout_ms=WAIT * 1000,
    )
    yield lambda text: encode([text])[0]


WAYS: Mapping[str, Way] = {"bridge": bridge, "lock": lock, "recipe": recipe, "batched": batched}


# --- the questions ---


def run_threads(way: Way, texts: list[str], threads: int) -> Speed:
    """Each thread asks for one text after another until all are through."""
    waits: list[float] = []
    left = iter(texts)
    turn = threading.Lock()

    def work(ask: Ask) -> None:
        while True:
            with turn:
                text = next(left, None)
            if text is None:
                return
            start = time.perf_counter()
            ask(text)
            waits.append(time.perf_counter() - start)

    with way() as ask:
        ask("warm up")
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(work, ask) for _ in range(threads)]:
                future.result()
        seconds = time.perf_counter() - start
    return _speed(waits, seconds)


def run_direct(texts: list[str]) -> Speed:
    """One call for everything, sorted and padded in batches of 32 as sentence-transformers does it."""
    start = time.perf_counter()
    sentence_transformer().encode(texts, batch_size=BATCH, show_progress_bar=False)
    return _speed([time.perf_counter() - start], time.perf_counter() - start, len(texts))


def run_list(texts: list[str]) -> Speed:
    """One ``bridge.embed`` of the list."""
    start = time.perf_counter()
    bridge_of_minilm().embed(texts)
    return _speed([time.perf_counter() - start], time.perf_counter() - start, len(texts))


def run_infinity(python: str, texts: list[str], threads: int) -> Speed:
    """infinity-emb's engine in a process of its own, fed by as many threads there."""
    order = {"folder": str(minilm_folder()), "texts": texts, "threads": threads}
    done = subprocess.run([python, "-c", INFINITY], input=json.dumps(order), capture_output=True, text=True, check=True)
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


INFINITY = """
import asyncio, json, os, statistics, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from infinity_emb import AsyncEmbeddingEngine, EngineArgs

order = json.loads(sys.stdin.read())
texts, threads = order["texts"], order["threads"]
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=order["folder"], engine="torch", device="cpu"))
asyncio.run_coroutine_threadsafe(engine.astart(), loop).result()
ask = lambda text: asyncio.run_coroutine_threadsafe(engine.embed([text]), loop).result()
ask("warm up")
waits, left, turn = [], iter(texts), threading.Lock()

def work(_):
    while True:
        with turn:
            text = next(left, None)
        if text is None:
            return
        start = time.perf_counter()
        ask(text)
        waits.append(time.perf_counter() - start)

start = time.perf_counter()
with ThreadPoolExecutor(threads) as pool:
    list(pool.map(work, range(threads)))
seconds = time.perf_counter() - start
waits.sort()
print(json.dumps({"texts_s": len(texts) / seconds, "p50_ms": statistics.median(waits) * 1000,
                  "p99_ms": waits[int(len(waits) * 0.99)] * 1000}), flush=True)
os._exit(0)  # its threads would hold the process
"""


def _speed(waits: list[float], seconds: float, count: int | None = None) -> Speed:
    waits = sorted(waits)
    return Speed((count or len(waits)) / seconds, statistics.median(waits) * 1000, waits[int(len(waits) * 0.99)] * 1000)


def check_equality(texts: list[str]) -> None:
    """The vectors are the model's own, however they were batched."""
    own = sentence_transformer().encode(texts, show_progress_bar=False)
    gap = float(np.abs(bridge_of_minilm().embed(texts) - own).max())
    print(f"{bridge_of_minilm().describe()}; largest difference from the model's own vectors {gap:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--texts", type=int, default=640)
    parser.add_argument("--infinity", metavar="PYTHON")
    options = parser.parse_args()
    threads = options.threads
    check_equality(mixed(64))
    for title, make in (("texts of 3 to 150 words", mixed), ("texts of 40 words", even)):
        texts = make(options.texts)
        runs: dict[str, Callable[[], Speed]] = {
            name: functools.partial(run_threads, way, texts, threads) for name, way in WAYS.items()
        }
        runs["direct, all at once"] = functools.partial(run_direct, texts)
        runs["bridge, one list"] = functools.partial(run_list, texts)
        if options.infinity:
            runs["infinity"] = functools.partial(run_infinity, options.infinity, texts, threads)
        results = interleave(runs, options.rounds)
        print_table(f"{threads} threads, {title} (ratios to the lock)", results, "lock")
        pairs = zip(results["bridge"], results["direct, all at once"], strict=True)
        print(f"bridge against direct: {statistics.median(own.texts_s / limit.texts_s for own, limit in pairs):.2f}")
    alone = interleave(
        {name: functools.partial(run_threads, WAYS[name], mixed(60, seed=2), 1) for name in ("lock", "bridge")},
        options.rounds,
    )
    print_table("one thread, texts of 3 to 150 words (ratios to encode)", alone, "lock")
    bridge_of_minilm().close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
