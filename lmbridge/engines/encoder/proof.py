"""Finds the correct layouts: encodes texts of very different lengths one by one, then together.

Rule: torch on the engine's worker thread, in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmbridge.engines.encoder.encoding import Item, TextEncoder
from lmbridge.engines.encoder.layouts import Grouped, Layout, Packed, Single
from lmbridge.engines.encoder.vectors import Score, Tail
from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.messages import Embed, Rerank

FINE, COARSE = 1e-5, 1e-3
"""How far a vector of length 1, or a score, may be from that of the text alone, in full and in half precision.
Unbounded scores are compared relative to the largest, if that exceeds 1."""
COUNTS = (3, 1, 40, 9, 200, 9, 90, 17)
"""Words of the texts."""
REPEATS = 3
FARTHEST = 1_024
"""Attention windows up to this width are tested beyond their edge."""
_TEXT = "the old sailor walked down to a harbour every morning and looked at that sea which was never quite same"
_WORDS = _TEXT.split()
_QUERY = "where did the sailor go"


@dataclass(frozen=True)
class Way:
    """A layout that can be tried."""

    name: str
    build: Callable[[], Layout]


def ways(model: Any, tail: Tail | None, like_roberta: bool) -> list[Way]:
    """All layouts, fastest first.

    Args:
        like_roberta: the model probably counts positions as RoBERTa does.
    """
    offsets = (None, 0) if like_roberta else (0, None)
    packed = [Way("packed", lambda offset=offset: Packed(model, tail, offset)) for offset in offsets]  # type: ignore[misc]
    return [*packed, Way("grouped", lambda: Grouped(model, tail)), Way("single", lambda: Single(model, tail))]


def check_items(encoder: TextEncoder, task: str, window: int | None, positions: int | None) -> list[Item]:
    """Texts of one word to many, or arbitrary tokens if the tokenizer does not know the words.

    Args:
        window: the model's attention window, if limited.
        positions: the size of the model's table of positions, if it has one. All texts together stay within it: a model
            that counts through the row would index beyond it, which on a GPU kills the process.
    """
    beyond = window + 40 if window is not None and window <= FARTHEST else 0
    counts = [max(count, beyond) if count == max(COUNTS) else count for count in COUNTS]
    while True:
        items = [_item(encoder, task, number, count) for number, count in enumerate(counts)]
        if positions is None or max(counts) == 1 or sum(item.size for item in items) <= positions:
            return items
        counts = [max(1, count * 2 // 3) for count in counts]


class Proof:
    """The model's output for each item alone.

    Args:
        score: makes scores; None for a model that makes vectors.

    Raises:
        EngineStartError: the output is invalid.
    """

    def __init__(self, items: Sequence[Item], score: Score | None, alone: torch.Tensor, dtype: torch.dtype) -> None:
        self._items = items
        self._score = score
        self._tolerance = FINE if dtype.itemsize >= 4 else COARSE
        self._expected = self._compared(alone)
        if not bool(self._expected.isfinite().all()):
            raise EngineStartError("The model's own output is not a number (NaN): its weights are broken, or overflow.")

    def fault(self, layout: Layout) -> str:
        """The fault of a layout's output, or "".

        Raises:
            Exception: whatever running it raises.
        """
        return self._fault(layout, 1) or self._fault(layout, REPEATS)

    def _fault(self, layout: Layout, times: int) -> str:
        """With each text ``times`` times in the batch, to exceed the model's positions."""
        found = self._compared(layout.run([*self._items] * times))
        expected = torch.cat([self._expected] * times)
        if found.shape != expected.shape:
            return f"returned shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        scale = max(1.0, float(expected.abs().max())) if self._score is not None and self._score.is_raw else 1.0
        apart = float((found - expected).abs().max()) / scale
        return "" if apart <= self._tolerance else f"differs by {apart:.2g} from the texts one by one"

    def _compared(self, outputs: torch.Tensor) -> torch.Tensor:
        if self._score is not None:
            return torch.from_numpy(self._score(outputs))
        return torch.nn.functional.normalize(outputs.cpu().double(), dim=-1)  # float32 overflows


def _item(encoder: TextEncoder, task: str, number: int, count: int) -> Item:
    text = " ".join(_WORDS[(7 * number + place) % len(_WORDS)] for place in range(count))
    job: Any = Embed(text, truncate="end") if task == "embed" else Rerank(_QUERY, text)
    try:
        return encoder.encode(job)
    except LMBridgeError:  # unknown words without an unknown token, or little room
        return encoder.made_up(job, number, count)
