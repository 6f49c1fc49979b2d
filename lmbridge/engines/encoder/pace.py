"""The speed of a model.

Rule: standard library only. Written by the engine's worker thread, read by the server thread; one attribute, set in one
step.
"""

from __future__ import annotations

_NEWEST = 0.2  # the weight of the last batch
_MOST = 1e9  # tokens; a share of a device may be of any length


class Pace:
    """Tokens a second, as a moving average over batches."""

    def __init__(self) -> None:
        self.rate: float | None = None

    def take(self, tokens: int, seconds: float) -> None:
        """Record a batch of ``tokens`` that took ``seconds``."""
        rate = tokens / max(seconds, 1e-6)
        self.rate = rate if self.rate is None else self.rate + _NEWEST * (rate - self.rate)

    def tokens_in(self, seconds: float) -> int | None:
        """How many tokens take that long, at least one; None if unknown."""
        return None if self.rate is None else max(1, int(min(self.rate * seconds, _MOST)))
