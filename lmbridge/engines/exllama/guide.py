"""Which tokens a grammar allows next in one answer, for ExLlama's filters.

Rule: the generation thread and the pool that ExLlama gives its filters, never two of them at once. llguidance decides
what may follow, through the same ``Grammars`` as in the transformers engine.
"""

from __future__ import annotations

import numpy
import torch

from lmbridge.engines.transformers.guides import Guide


class Mask:
    """One bit per token, lowest first, set if it may come next."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._row = torch.zeros((1, (guide.home.size + 31) // 32 * 4), dtype=torch.uint8)

    def chosen(self, token: int) -> None:
        """Record a chosen token."""
        self._guide.home.chosen([(self._guide, token)])

    def fill(self) -> torch.Tensor:
        """Compute the bits for the next token."""
        self._guide.home.fill([(self._guide, 0)], self._row)
        return self._row

    def allowed(self, size: int) -> torch.Tensor:
        """The last bits, as ``size`` flags."""
        return torch.from_numpy(numpy.unpackbits(self._row[0].numpy(), bitorder="little")[:size]).bool()
