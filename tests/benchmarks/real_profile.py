"""Where a step of lmbridge goes on a real model.

Run: ``python -m tests.benchmarks.real_model --rounds 0 --profile``

The functions that a step passes on the generation thread are wrapped; each is charged with its own time on the clock,
without that of the wrapped ones inside, so that the parts add up to the step. Steps in which every caller gets a token
and no prompt is read are shown by themselves, beside the model's bare forward of as many rows.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner

from lmbridge import Bridge
from lmbridge.engines.transformers import attention
from lmbridge.engines.transformers.processor import _Processors

LOOP, IDLE = "transformers: rest of the loop", "waiting for requests"
LINEAR, ATTENTION, CACHE, MODEL = "linear layers", "attention", "cache: write, read", "rest of the model"
PREPARE, UPDATE, CHOOSE = "transformers: schedule, prepare", "transformers: update", "transformers: argmax"
SAMPLER, HAND_OVER = "ours: sampler", "hand-over to the loop"
STEP = "the step"
PARTS = [LINEAR, ATTENTION, CACHE, MODEL, PREPARE, CHOOSE, UPDATE, LOOP, SAMPLER, HAND_OVER]


class Clock:
    """Seconds of each part of each step. Only one thread's: the one that runs the model."""

    def __init__(self) -> None:
        self._inside: list[float] = []  # for each open call, the seconds of the wrapped ones inside
        self._thread: int | None = None
        self._now: defaultdict[str, float] = defaultdict(float)
        self.steps: list[tuple[int, dict[str, float]]] = []  # tokens read, seconds by part

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``function``, with ``name`` charged for what it takes."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._thread != threading.get_ident():
                return function(*args, **kwargs)
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                self._now[name] += seconds - self._inside.pop()
                if self._inside:
                    self._inside[-1] += seconds

        return timed

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Charge ``name`` with what ``owner.attribute`` takes."""
        setattr(owner, attribute, self.timed(getattr(owner, attribute), name))

    def watch(self) -> None:
        """Wrap every function that a step passes."""
        for owner, attribute, name in (
            (torch.nn.Linear, "forward", LINEAR),
            (PagedAttentionCache, "update", CACHE),
            (ContinuousBatchProcessor, "prepare_next_batch", PREPARE),
            (ContinuousBatchProcessor, "update_batch", UPDATE),
            (ModelRunner, "_sample", CHOOSE),
            (OutputRouter, "deliver_batch", HAND_OVER),
            (_Processors, "prepare_tensor_args", SAMPLER),
            (_Processors, "__call__", SAMPLER),
            (threading.Event, "wait", IDLE),
        ):
            self.wrap(owner, attribute, name)
        known: Any = transformers.AttentionInterface()
        for name in {"sdpa", attention.NAME} & set(known):
            transformers.AttentionInterface.register(name, self.timed(known[name], ATTENTION))
        self._watch_steps()

    def _watch_steps(self) -> None:
        step = self.timed(ContinuousBatchingManager._generation_loop_body, LOOP)
        forward = self.timed(transformers.LlamaForCausalLM.forward, MODEL)
        read = 0

        def noted_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal read
            read = kwargs["input_ids"].numel()
            return forward(*args, **kwargs)

        def noted_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal read
            self._thread, read = threading.get_ident(), 0
            self._now.clear()
            try:
                return step(*args, **kwargs)
            finally:
                if read:
                    self.steps.append((read, dict(self._now)))

        functools.update_wrapper(noted_forward, transformers.LlamaForCausalLM.forward)  # its signature is looked at
        transformers.LlamaForCausalLM.forward = noted_forward
        ContinuousBatchingManager._generation_loop_body = noted_step


@dataclass
class Profile:
    """One crowd's answers.

    Attributes:
        steps: tokens read in each, seconds by part.
        seconds: of the whole.
        limit: seconds of the bare forward of as many rows.
    """

    callers: int
    tokens: int
    steps: list[tuple[int, dict[str, float]]]
    seconds: float
    limit: float

    @property
    def full(self) -> list[dict[str, float]]:
        """The steps in which every caller gets a token, and no prompt is read."""
        return [parts for read, parts in self.steps if read == self.callers]

    @property
    def step(self) -> float:
        """Seconds of the median of those."""
        return statistics.median(sum(parts.values()) for parts in self.full)

    def part(self, name: str) -> str:
        """Milliseconds of a part in such a step, and its share."""
        seconds = self.step if name == STEP else statistics.median(parts.get(name, 0.0) for parts in self.full)
        return f"{1000 * seconds:.1f} ms ({100 * seconds / self.step:.0f}%)"

    def whole(self) -> str:
        speed = self.tokens / self.seconds
        prompts = [(read, sum(parts.values())) for read, parts in self.steps if read > self.callers]
        return (
            f"{self.callers} caller{'s' * (self.callers > 1)}: {speed:.0f} tokens/s, "
            f"{100 * speed * self.limit / self.callers:.0f}% of the limit; of {self.seconds:.1f} s, "
            f"{sum(taken for _, taken in prompts):.1f} s in {len(prompts)} steps that read "
            f"{sum(read for read, _ in prompts)} tokens of prompts. A step in which all decode is at "
            f"{100 * self.limit / self.step:.0f}% of the limit"
        )


def run(folder: str, questions: Iterator[str], limits: Mapping[int, float], tokens: int) -> None:
    """Print where steps go.

    Args:
        limits: for each number of callers, the seconds of the bare forward.
        tokens: of each answer.
    """
    clock = Clock()
    with Bridge(folder) as bridge, ThreadPoolExecutor(max(limits)) as threads:
        bridge.infer(next(questions), max_new_tokens=4)
        clock.watch()

        def ask(question: str) -> None:
            bridge.infer(question, max_new_tokens=tokens, ignore_eos=True)

        profiles = []
        for callers, limit in limits.items():
            clock.steps = []
            began = time.perf_counter()
            list(threads.map(ask, itertools.islice(questions, callers)))
            seconds = time.perf_counter() - began
            profiles.append(Profile(callers, callers * tokens, clock.steps, seconds, limit))
    show(profiles)


def show(profiles: Sequence[Profile]) -> None:
    head = [
        "a step in which all decode",
        *(f"{profile.callers} caller{'s' * (profile.callers > 1)}" for profile in profiles),
    ]
    rows = [[name, *(profile.part(name) for profile in profiles)] for name in [*PARTS, STEP]]
    limits = [f"{1000 * profile.limit:.1f} ms ({100 * profile.limit / profile.step:.0f}%)" for profile in profiles]
    print(f"\n{table(head, [*rows, ['the bare forward', *limits]])}")
    print("\n".join(profile.whole() for profile in profiles), flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A simple table of reStructuredText."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = " ".join(cell.ljust(width) for cell, width in zip(head, widths, strict=True)).rstrip()
    return "\n".join([rule, title, rule, *lines, rule])
