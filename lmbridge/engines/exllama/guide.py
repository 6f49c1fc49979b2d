"""Which tokens a grammar allows next in one answer, for ExLlama's filters.

Rule: the generation thread and the pool that ExLlama gives its filters, never two of them at once. What may follow is
llguidance's to say, by the same ``Grammars`` as with the transformers engine.
"""

from __future__ import annotations

import numpy
import torch

from lmbridge.engines.transformers.guides import Guide


class Mask:
    """A bit for each token, the first lowest, set where it may come next."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._row = torch.zeros((1, (guide.home.size + 31) // 32 * 4), dtype=torch.uint8)

    def chosen(self, token: int) -> None:
        """This token has come."""
        self._guide.home.chosen([(self._guide, token)])

    def fill(self) -> torch.Tensor:
        """The bits for the next token."""
        self._guide.home.fill([(self._guide, 0)], self._row)
        return self._row

    def allowed(self, size: int) -> torch.Tensor:
        """The bits that were filled in last, as so many flags."""
        return torch.from_numpy(numpy.unpackbits(self._row[0].numpy(), bitorder="little")[:size]).bool()
