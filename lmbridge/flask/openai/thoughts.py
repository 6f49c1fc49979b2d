"""Counts the reasoning tokens of a request's answers: OpenAI's ``reasoning_tokens``.

Rule: plain data in, a number out.
"""

from __future__ import annotations

from lmbridge.messages import Delta, Response


class ThoughtTokens:
    """Counts reasoning tokens of whole answers or of deltas.

    Engines do not say which tokens are reasoning; if there is other text too, the share is estimated by length.
    """

    def __init__(self) -> None:
        self._counted = 0.0

    @property
    def count(self) -> int:
        return round(self._counted)

    def add(self, said: Delta | Response) -> None:
        if said.reasoning:
            others = len(said.text) + sum(len(call.arguments) for call in said.tool_calls)
            self._counted += len(said.token_ids) * len(said.reasoning) / (len(said.reasoning) + others)
