"""One request inside an engine that generates token by token.

Rule: plain data, no torch; server thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmbridge.engines.base import Sink
from lmbridge.engines.text import Piece, TextStream
from lmbridge.messages import Delta, FinishReason, Logprobs, Request, Usage

if TYPE_CHECKING:
    from lmbridge.engines.transformers.sampling import Plan


@dataclass(slots=True)
class Running:
    """What is known of a request from its first step to its last.

    Attributes:
        key: the library's name for it, never used twice.
        stop_ids: the tokens that end it.
        plan: how its tokens are chosen, and their log-probabilities.
        generated: tokens so far, whether told to the sink or not.
        held: tokens that the sink was not told of so far, because their text is not settled.
    """

    key: str
    request: Request
    sink: Sink
    stream: TextStream
    stop_ids: frozenset[int]
    plan: Plan
    prompt_tokens: int = 0
    generated: int = 0
    held: list[tuple[int, Logprobs | None]] = field(default_factory=list)

    def take(self, tokens: Sequence[int], finished: bool) -> tuple[Piece, bool]:
        """Take in all tokens generated so far, and tell what may be shown and whether the last is one that ends it."""
        known, self.generated = self.generated, len(tokens)
        ended = finished and bool(tokens) and tokens[-1] in self.stop_ids
        new = tokens[known : len(tokens) - ended]
        logprobs = self.plan.logprobs
        self.held += [(token, logprobs[known + at] if logprobs else None) for at, token in enumerate(new)]
        return self.stream.push(new), ended

    def delta(self, piece: Piece, reason: FinishReason | None) -> Delta:
        """The piece with the tokens that belong to it."""
        shown, self.held = self.held[: piece.tokens], self.held[piece.tokens :]
        wanted = self.request.config.logprobs is not None
        return Delta(
            text=piece.text,
            token_ids=[token for token, _ in shown],
            logprobs=[entry for _, entry in shown if entry is not None] if wanted else None,
            finish_reason=reason,
            usage=Usage(self.prompt_tokens, self.generated) if reason else None,
        )
