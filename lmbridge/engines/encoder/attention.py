"""Attention over one row of many texts, each seeing only itself; or over a padded batch, as usual.

Rule: runs on the engine's worker thread, inside the model's forward, once per layer; call ``install`` first. It relies
on what transformers documents: a custom attention function with a mask function, and a keyword passed through the
model's forward. If an architecture deviates, the self-check detects it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "lmbridge_packed"  # one per process: another function with the same name would replace it
_NOT_KNOWN = ("position_bias", "softcap", "s_aux", "head_mask", "block_mask")


_FAR = 1 << 40  # farther than any text is long
_States = Sequence[torch.Tensor]
"""Query, key and value."""


class Run:
    """Adjacent texts in the row that are attended to in one call.

    Attributes:
        start, end: their tokens.
        texts: how many there are.
        longest: tokens of the longest.
        even: all have this length.
    """

    def __init__(self, start: int, lengths: Sequence[int]) -> None:
        self.start, self.end = start, start + sum(lengths)
        self.texts = len(lengths)
        self.longest = lengths[-1]
        self.even = lengths[0] == lengths[-1]
        self._lengths = lengths
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each padded position: its token's place in the row, and whether it is real; both (texts, longest)."""
        if self._places is None:  # made by the first layer
            lengths = torch.tensor(self._lengths, device=device)
            steps = torch.arange(self.longest, device=device)
            real = steps < lengths[:, None]
            self._places = (
                torch.where(real, (self.start + lengths.cumsum(0) - lengths)[:, None] + steps, self.start),
                real,
            )
        return self._places


class Segments:
    """The positions of a row's texts, sorted by ascending length.

    Args:
        slack: how much longer than the shortest the longest text of a run may be. 1 attends only to texts of equal
            length in one call and pads nothing, which is best on a CPU; more means fewer calls, each of which costs a
            GPU the same, with padding in the attention only.
    """

    def __init__(self, lengths: Sequence[int], slack: float = 1.0) -> None:
        self.runs: list[Run] = []
        first = start = 0
        for place in range(1, len(lengths) + 1):
            if place == len(lengths) or lengths[place] > slack * lengths[first]:
                self.runs.append(Run(start, lengths[first:place]))
                first, start = place, self.runs[-1].end


def install() -> None:
    """Register the attention with transformers as ``NAME``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def chosen(model: Any) -> str | None:
    """The model's attention, from an undocumented attribute of transformers; None if that is gone."""
    found: str | None = getattr(model.config, "_attn_implementation", None)
    return found


def is_taken(model: Any) -> bool:
    """Whether the model's attention can be replaced by ours; leaves the model unchanged."""
    usual = chosen(model)
    if usual is None:
        return False
    log, silent = logging.getLogger("transformers.modeling_utils"), logging.Filter()
    silent.filter = lambda record: False  # type: ignore[method-assign]  # it warns of what we ask
    log.addFilter(silent)
    try:
        model.set_attn_implementation(NAME)
        return chosen(model) == NAME
    except ValueError:
        return False
    finally:
        model.set_attn_implementation(usual)
        log.removeFilter(silent)


def mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """A mask only if there is padding."""
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
    plain = functools.partial(scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    if attention_mask is not None:  # a padded batch from someone sharing the model
        return plain(query, key, value, attn_mask=attention_mask).transpose(1, 2), None
    states = (query, key, value)
    if segments is None or (len(segments.runs) == 1 and segments.runs[0].texts == 1):
        return _whole(plain, states, causal, sliding_window).transpose(1, 2), None
    answers = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for run in segments.runs:
        if run.even:
            answer = _whole(plain, [_cut(part, run) for part in states], causal, sliding_window).transpose(1, 2)
            answers[0, run.start : run.end].view(answer.shape).copy_(answer)
        else:
            places, real = run.places(query.device)
            rows = [part[0][:, places].transpose(0, 1) for part in states]
            answers[0, run.start : run.end] = _filled(plain, rows, real, causal, sliding_window).transpose(1, 2)[real]
    return answers, None


def _cut(states: torch.Tensor, run: Run) -> torch.Tensor:
    """(texts, heads, tokens of one, size) out of a row; nothing is copied where the row is as models make it."""
    part = states[0, :, run.start : run.end]
    return part.view(-1, run.texts, run.longest, part.shape[-1]).transpose(0, 1)


def _filled(plain: Any, states: _States, real: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    """Rows that end in padding, whose outputs are ignored."""
    tokens = real.shape[1]
    seen = real[:, None, None]
    if causal or (window is not None and tokens > window):
        seen = seen & _band(tokens, window or tokens, causal, real.device)
    answer: torch.Tensor = plain(*states, attn_mask=seen)
    return answer


def _whole(plain: Any, states: _States, causal: bool, window: int | None) -> torch.Tensor:
    """Rows without padding."""
    tokens = states[0].shape[2]
    answer: torch.Tensor
    if window is None or tokens <= window:
        answer = plain(*states, is_causal=causal and tokens > 1)
    else:
        answer = plain(*states, attn_mask=_band(tokens, window, causal, states[0].device))
    return answer


def _band(tokens: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """(tokens, tokens): each sees those that are less than ``window`` away; a corner of one that is kept."""
    if window >= tokens:
        window = _FAR
    return _whole_band(1 << (tokens - 1).bit_length(), window, causal, device)[:tokens, :tokens]


@functools.lru_cache(maxsize=4)
def _whole_band(tokens: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    places = torch.arange(tokens, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window
