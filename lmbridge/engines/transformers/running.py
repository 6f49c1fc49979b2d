"""One request inside an engine that generates token by token.

Rule: plain data, no torch; server thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmbridge.engines.base import Sink
from lmbridge.engines.dialect import Reader, read_apart
from lmbridge.engines.text import Piece, TextStream
from lmbridge.messages import Delta, FinishReason, Request, Usage

if TYPE_CHECKING:
    from lmbridge.engines.transformers.plan import Plan


@dataclass(slots=True)
class Running:
    """The state of a request, from its first step to its last.

    Attributes:
        key: the library's name for it, never used twice.
        stop_ids: the tokens that end it.
        plan: how its tokens are chosen, and their log-probabilities.
        tokens: all tokens generated so far.
        told: how many of them the sink was told of; the text of the others is not settled, or they end the answer.
        tells_prompt: the next delta is to tell the prompt's tokens.
        reader: takes the text apart, where thoughts and calls are told apart; set before the first step.
    """

    key: str
    request: Request
    sink: Sink
    stream: TextStream
    stop_ids: frozenset[int]
    plan: Plan
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    told: int = 0
    tells_prompt: bool = False
    reader: Reader | None = None

    def take(self, tokens: Sequence[int], finished: bool) -> tuple[Piece, bool]:
        """Take all tokens generated so far; returns what may be shown, and whether the last token ends the answer."""
        known, self.tokens = len(self.tokens), list(tokens)
        ended = finished and bool(tokens) and tokens[-1] in self.stop_ids
        return self.stream.push(self.tokens[known : len(tokens) - ended]), ended

    def delta(self, piece: Piece, reason: FinishReason | None) -> Delta:
        """The piece with the tokens that belong to it."""
        start, self.told = self.told, self.told + piece.tokens
        delta = Delta(
            piece.text,
            self.tokens[start : self.told],
            self.plan.logprobs[start : self.told] if self.plan.wants_logprobs is not None else None,
            reason,
            Usage(self.prompt_tokens, len(self.tokens)) if reason else None,
        )
        if self.tells_prompt:
            self._tell_prompt(delta)
        if self.reader is not None:
            read_apart(self.reader, delta)
        return delta

    def _tell_prompt(self, delta: Delta) -> None:
        """An answer that is given up before its first token has read nothing."""
        self.tells_prompt = False
        plan = self.plan
        delta.prompt_token_ids = list(plan.prompt)
        if plan.reading is not None and not plan.reading.unread(plan.prompt):
            delta.prompt_logprobs = plan.reading.entries
