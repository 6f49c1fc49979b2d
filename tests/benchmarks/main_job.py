"""The main job measured: 32 threads with 32 prompts, and what they would have used instead.

Candidates, interleaved in one process, medians of the rounds:

- bridge: 32 threads call ``bridge.infer``
- streams: 32 threads read ``bridge.stream`` to its end
- native: one task on the engine's own loop hands it the same 32 prompts, and nobody crosses threads
- lock: 32 threads call ``model.generate`` one after another behind a lock

Run: ``python -m tests.benchmarks.main_job [--rounds 5] [--prompts 32] [--model demo]``
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmbridge import Bridge, Delta, GenerationConfig, Request
from lmbridge.engines.models import find_model
from lmbridge.engines.transformers import TransformersEngine

ANIMALS = ["fox", "owl", "bear", "cat", "dog", "wolf", "hare", "duck", "frog", "goat", "mouse", "horse"]
COUNTRIES = ["France", "Japan", "Peru", "Kenya", "Italy", "Norway"]


def make_prompts(count: int) -> list[str]:
    """Two stories for each short question, as a mixed crowd would ask."""
    prompts = []
    for number in range(count):
        if number % 3 < 2:
            prompts.append(f"Tell me a story about a {ANIMALS[number % len(ANIMALS)]}.")
        elif number % 2:
            prompts.append(f"What is the capital of {COUNTRIES[number % len(COUNTRIES)]}?")
        else:
            prompts.append(f"What is {number} + {number + 7}?")
    return prompts


class Native:
    """The same engine class on a loop of its own, with no thread to cross."""

    def __init__(self, model: str) -> None:
        self.engine = TransformersEngine(model)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.engine.start())
        self._ids = 0

    def run(self, prompts: list[str], config: GenerationConfig) -> list[str]:
        return self.loop.run_until_complete(self._run(prompts, config))

    async def _run(self, prompts: list[str], config: GenerationConfig) -> list[str]:
        return list(await asyncio.gather(*(self._one(prompt, config) for prompt in prompts)))

    async def _one(self, prompt: str, config: GenerationConfig) -> str:
        texts: list[str] = []
        ended = self.loop.create_future()

        def sink(delta: Delta) -> None:
            texts.append(delta.text)
            if delta.finish_reason is not None:
                ended.set_result(None)

        self._ids += 1
        now = time.monotonic()
        request = Request(f"native-{self._ids}", prompt, config, False, "native", 0, None, now, copy_context())
        self.engine.add_request(request, sink)
        await ended
        return "".join(texts)

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


class Locked:
    """What people write first: the model behind a lock."""

    def __init__(self, model: str) -> None:
        path = find_model(model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.lock = threading.Lock()

    def infer(self, prompt: str, config: GenerationConfig) -> str:
        messages = [{"role": "user", "content": prompt}]
        with self.lock, torch.no_grad():
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            mask = torch.ones_like(ids)
            output = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=config.max_new_tokens, do_sample=False
            )
            return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def in_threads(ask: Callable[[str], str], prompts: list[str]) -> list[str]:
    """One thread a prompt, all at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def measure(candidates: dict[str, Callable[[], list[str]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each candidate; the order turns from round to round."""
    answers = {name: run() for name, run in candidates.items()}  # a warm-up, and a check that all say the same
    reference = answers["native"]
    for name, texts in answers.items():
        same = sum(text == other for text, other in zip(texts, reference, strict=True))
        print(f"{name}: {same} of {len(reference)} answers equal the native ones")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    """Medians, and the ratio to the bridge within each round."""
    print(f"{'candidate':<10} {'median s':>9} {'min s':>7} {'max s':>7} {'time / bridge (median, min, max)':>34}")
    for name, values in seconds.items():
        ratios = [value / bridge for value, bridge in zip(values, seconds["bridge"], strict=True)]
        print(
            f"{name:<10} {statistics.median(values):9.3f} {min(values):7.3f} {max(values):7.3f} "
            f"{statistics.median(ratios):18.3f} {min(ratios):7.3f} {max(ratios):7.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.prompts)
    config = GenerationConfig(max_new_tokens=400)
    native, locked = Native(arguments.model), Locked(arguments.model)
    with Bridge(arguments.model) as bridge:

        def read(prompt: str) -> str:
            return "".join(delta.text for delta in bridge.stream(prompt, config))

        report(
            measure(
                {
                    "bridge": lambda: in_threads(lambda prompt: bridge.infer(prompt, config).text, prompts),
                    "streams": lambda: in_threads(read, prompts),
                    "native": lambda: native.run(prompts, config),
                    "lock": lambda: in_threads(lambda prompt: locked.infer(prompt, config), prompts),
                },
                arguments.rounds,
            )
        )
    native.close()


if __name__ == "__main__":
    main()
