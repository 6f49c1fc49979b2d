"""What choosing the tokens of one step costs, beside transformers' own processors that draw for a whole batch alike.

Scores fall off as those of a language model do. One thread computes; figures are milliseconds of one step, prepared
and chosen. ``flat`` is a mix whose rows keep most of the vocabulary, more than is looked at first.

Run: ``python -m tests.benchmarks.sampler_cost [--rows 32] [--sizes 3072,49152,151936] [--rounds 15]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from lmbridge.engines.transformers.sampling import Plan, Sampler
from lmbridge.messages import GenerationConfig
from tests.benchmarks.measure import interleave, print_table

MIXES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"temperature": 0.8},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.9},
    "temperature, top_k": {"temperature": 0.8, "top_k": 50},
    "min_p": {"min_p": 0.05},
    "all filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalty, greedy": {"do_sample": False, "repetition_penalty": 1.1},
    "logprobs, greedy": {"do_sample": False, "logprobs": 5},
    "flat": {"temperature": 2.0, "top_p": 0.95},
}


@dataclass
class Result:
    """One round of one way."""

    step_ms: float


def falling(rows: int, size: int) -> torch.Tensor:
    """Scores whose probabilities fall with their rank, at places of chance."""
    ranks = torch.arange(1, size + 1).float()
    return torch.stack([(-1.8 * ranks.log())[torch.randperm(size)] for _ in range(rows)]) + 0.3 * torch.randn(
        rows, size
    )


def ours(fields: dict[str, Any], raw: torch.Tensor) -> Callable[[], Any]:
    """One step of the sampler after another, for the same requests."""
    rows, size = raw.shape
    sampler = Sampler(size, rows)
    config = GenerationConfig(**fields)
    plans = [Plan(config, range(100)) for _ in range(rows)]

    def step() -> Any:
        sampler.prepare(plans)
        return sampler.choose(raw) if sampler.active else None

    return step


def theirs(fields: dict[str, Any], raw: torch.Tensor) -> Callable[[], Any]:
    """What ``generate`` would do with the scores of a batch."""
    ids = torch.arange(100).expand(len(raw), -1)
    makers: dict[str, Any] = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    processors = [maker(fields[name]) for name, maker in makers.items() if name in fields]

    def step() -> Any:
        scores = raw
        for processor in processors:
            scores = processor(ids, scores)
        if fields.get("do_sample") is False:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return step


def timed(step: Callable[[], Any], steps: int) -> Result:
    """The median of so many steps."""
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return Result(statistics.median(taken) * 1000)


def compare(name: str, raw: torch.Tensor, rounds: int) -> None:
    """Measure one mix and print one table."""
    rows, size = raw.shape
    steps = max(1, 100_000 // size)
    mine, others = ours(MIXES[name], raw), theirs(MIXES[name], raw)
    candidates = {"ours": lambda: timed(mine, steps), "transformers": lambda: timed(others, steps)}
    print_table(f"{name}, {rows} rows of {size}", interleave(candidates, rounds), "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--sizes", default="3072,49152,151936")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        for size in map(int, arguments.sizes.split(",")):
            raw = falling(arguments.rows, size)
            for name in MIXES:
                compare(name, raw, arguments.rounds)


if __name__ == "__main__":
    main()
