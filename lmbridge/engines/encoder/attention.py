"""Attention over one row that holds many texts, in which each sees itself only; or over a padded batch, as usual.

Rule: runs on the engine's worker thread, inside the model's forward, once per layer; ``install`` before. It is reached
by what transformers documents: an attention function of its own with a function for masks beside it, and a keyword of
the model's forward that is handed on to it. Where an architecture does otherwise, the self-check finds out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "lmbridge_segments"
_NOT_KNOWN = ("position_bias", "softcap", "s_aux", "head_mask", "block_mask")


class Segments:
    """Where the texts of a row are: those of equal length are neighbours, and are attended to in one call.

    Attributes:
        runs: (first token, texts, tokens of each).
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.runs: list[tuple[int, int, int]] = []
        start = 0
        for length in lengths:
            if self.runs and self.runs[-1][2] == length:
                self.runs[-1] = self.runs[-1][0], self.runs[-1][1] + 1, length
            else:
                self.runs.append((start, 1, length))
            start += length


def install() -> None:
    """Make it known to transformers by ``NAME``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """A mask only where somebody pads."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The answers, (rows, tokens, heads, size). ``query``, ``key``, ``value``: (rows, heads, tokens, size)."""
    unknown = [name for name in _NOT_KNOWN if kwargs.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"the attention {NAME!r} does not know {', '.join(unknown) or 'dropout'}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    shared = query.shape[1] != key.shape[1]
    plain = functools.partial(scaled_dot_product_attention, scale=scaling, enable_gqa=shared)
    if attention_mask is not None:  # a padded batch of somebody who shares the model
        return plain(query, key, value, attn_mask=attention_mask).transpose(1, 2), None
    if segments is None:
        return _whole(plain, query, key, value, causal, sliding_window).transpose(1, 2), None
    if len(segments.runs) == 1 and segments.runs[0][1] == 1:
        return _whole(plain, query, key, value, causal, sliding_window).transpose(1, 2), None
    answers = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for start, texts, length in segments.runs:
        queries, keys, values = (_cut(states, start, texts, length) for states in (query, key, value))
        answer = _whole(plain, queries, keys, values, causal, sliding_window)
        answers[0, start : start + texts * length].view(texts, length, *answers.shape[2:]).copy_(answer.transpose(1, 2))
    return answers, None


def _cut(states: torch.Tensor, start: int, texts: int, length: int) -> torch.Tensor:
    """(texts, heads, tokens of one, size) out of a row; nothing is copied where the row is as models make it."""
    part = states[0, :, start : start + texts * length]
    return part[None] if texts == 1 else part.view(-1, texts, length, part.shape[-1]).transpose(0, 1)


def _whole(
    plain: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Rows without padding."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        answer: torch.Tensor = plain(query, key, value, is_causal=causal and tokens > 1)
        return answer
    seen: torch.Tensor = plain(query, key, value, attn_mask=_band(tokens, window, causal, query.device))
    return seen


@functools.lru_cache(maxsize=64)
def _band(tokens: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """(tokens, tokens): each sees those that are less than ``window`` away."""
    places = torch.arange(tokens, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window
