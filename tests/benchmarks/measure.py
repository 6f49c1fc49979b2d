"""Candidates side by side in one process: in turn within each round, the first one changing from round to round.

Ratios are taken within a round, so that what the machine does meanwhile is in both of their terms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

R = TypeVar("R")


def interleave(candidates: Mapping[str, Callable[[], R]], rounds: int) -> dict[str, list[R]]:
    """The results of each candidate, one a round."""
    results: dict[str, list[R]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(candidates[name]())
    return results


def print_table(title: str, results: Mapping[str, list[R]], base: str) -> None:
    """The median of each figure, and in brackets the median of its ratios to ``base`` (of the same round)."""
    columns = [field.name for field in fields(next(iter(results.values()))[0])]  # type: ignore[arg-type]
    width = max(map(len, results)) + 2
    print(f"\n{title}\n{'':{width}}" + "".join(f"{name.replace('_', ' '):>26}" for name in columns))
    for name, rounds in results.items():
        cells = []
        for column in columns:
            values = [getattr(result, column) for result in rounds]
            others = [getattr(result, column) for result in results[base]]
            ratios = [value / other for value, other in zip(values, others, strict=True) if other]
            ratio = f"({statistics.median(ratios):.2f})" if ratios else ""
            cells.append(f"{statistics.median(values):16.4g} {ratio:>9}")
        print(f"{name:{width}}" + "".join(cells), flush=True)
