"""One GGUF file by two engines: tokens a second of llama.cpp and of transformers, asked by 1, 4 and 16 threads.

Both have the same file (SmolLM2-135M-Instruct, Q4_1), which transformers makes plain numbers of, the same prompts and
the same number of tokens to write; they are asked in turn, the first one changing from round to round.
``llamacpp-plain`` is llama.cpp on the same weights as plain numbers.

``--words 1000 --tokens 1`` is about reading: prompts of so many words, each asked once; what is counted are answers.

Run: ``python -m tests.benchmarks.llamacpp_speed [--rounds 5] [--tokens 48] [--words 0] [--cores 2] [--callers 1,4,16]``
(needs xllamacpp and gguf; the first run fetches the model)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lmbridge import Bridge
from tests.benchmarks.measure import interleave, print_table
from tests.engines.llamacpp.real import plain_gguf, real_gguf

QUESTIONS = ("What is the capital of {}?", "Write a short poem about {}.", "What do people eat in {}?", "Where is {}?")
WORDS = ("time", "people", "way", "year", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "Egypt", "Chile", "India")
_times = itertools.count()


@dataclass
class Speed:
    """``tokens_s`` that were written; ``cpu_s`` of this process for 100 of them."""

    tokens_s: float
    cpu_s: float


def ask(bridge: Bridge, pool: ThreadPoolExecutor, prompts: list[str], tokens: int, words: int) -> Speed:
    """All the prompts, a thread each."""
    prompts = lengthened(prompts, words)
    start, cpu = time.perf_counter(), time.process_time()
    infer = functools.partial(bridge.infer, max_new_tokens=tokens, ignore_eos=True, timeout=600)
    written = sum(response.usage.completion_tokens for response in pool.map(infer, prompts))
    return Speed(written / (time.perf_counter() - start), 100 * (time.process_time() - cpu) / written)


def prompts_for(callers: int) -> list[str]:
    """As many as there are callers, and 2 at least."""
    every = [question.format(place) for place in PLACES for question in QUESTIONS]
    return every[: max(callers, 2)]


def lengthened(prompts: list[str], words: int) -> list[str]:
    """The prompts with so many words more, other ones each time: what was read before need not be read again."""
    if not words:
        return prompts
    chance = random.Random(next(_times))
    return [" ".join([*chance.choices(WORDS, k=words), prompt]) for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--words", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--callers", default="1,4,16")
    given = parser.parse_args()
    quantised = real_gguf()
    usual = {
        "max_batch_size": 16,
        "max_context": 1024 if given.words < 500 else 2 * given.words,
        "threads": given.cores,
    }
    with (
        Bridge(str(quantised), engine="llamacpp", **usual) as llamacpp,
        Bridge(str(plain_gguf(quantised)), engine="llamacpp", **usual) as plain,
        Bridge(str(quantised), engine="transformers", **usual) as transformers,
    ):
        bridges = {"transformers": transformers, "llamacpp": llamacpp, "llamacpp-plain": plain}
        for callers in map(int, given.callers.split(",")):
            with ThreadPoolExecutor(callers) as pool:
                candidates: dict[str, Callable[[], Speed]] = {
                    name: functools.partial(ask, bridge, pool, prompts_for(callers), given.tokens, given.words)
                    for name, bridge in bridges.items()
                }
                interleave(candidates, 1)  # what is slow the first time only
                results = interleave(candidates, given.rounds)
            load = os.getloadavg()[0]
            print_table(f"{callers} callers, {given.cores} threads, load {load:.1f}", results, "transformers")


if __name__ == "__main__":
    main()
