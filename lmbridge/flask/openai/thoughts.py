"""How many tokens of the answers to a request were thoughts: OpenAI's ``reasoning_tokens``.

Rule: plain data in, a number out.
"""

from __future__ import annotations

from lmbridge.messages import Delta, Response


class ThoughtTokens:
    """Counts them as answers come, whole or in deltas.

    Tokens are not told apart; where something has more than reasoning, that has a share by its length.
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
