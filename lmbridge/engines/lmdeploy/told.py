"""LMDeploy's outputs besides tokens, and the prompt details for the caller.

Rule: plain data of one request; server thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmbridge.messages import Delta, GenerationConfig

_BESIDE = ("logits", "last_hidden_state", "routed_experts")


class Told:
    """The non-token outputs of one answer.

    Args:
        prompt: its token ids.
    """

    def __init__(self, config: GenerationConfig, prompt: Sequence[int]) -> None:
        self._prompt: Sequence[int] | None = prompt if config.return_prompt_token_ids else None  # until it was sent
        self._keeps_ending = bool(getattr(config, "keep_ending_token", None))
        self._ending: Any = None  # LMDeploy's last part, where it holds the token that ended the answer
        self._beside: dict[str, Any] = {}

    def take(self, out: Any) -> list[int]:
        """Record a part from LMDeploy; returns its tokens that belong to the answer."""
        self._beside |= {name: found for name in _BESIDE if (found := getattr(out, name, None)) is not None}
        if cached := getattr(out, "cached_tokens", 0):
            self._beside["cached_tokens"] = cached
        if self._keeps_ending and out.finish_reason == "stop":
            self._ending = out
            return []
        return out.token_ids or []

    def with_prompt(self, delta: Delta) -> Delta:
        """Add the prompt's tokens to the answer's first delta."""
        delta.prompt_token_ids, self._prompt = self._prompt, None
        return delta

    def with_rest(self, delta: Delta) -> Delta:
        """Add everything else to the last delta."""
        delta.value = self._beside or None
        if self._ending is not None:
            delta.text += self._ending.response
            delta.token_ids = [*delta.token_ids, *self._ending.token_ids]
            if delta.logprobs is not None:
                delta.logprobs = [*delta.logprobs, *(self._ending.logprobs or ())]
        return self.with_prompt(delta)
