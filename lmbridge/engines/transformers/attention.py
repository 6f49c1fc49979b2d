"""Attention over a packed batch in which each request sees itself only, for CPUs.

Rule: torch only; runs on the generation thread, inside the model's forward, once per layer.

A step of continuous batching packs the tokens of all requests into one row. transformers' own ``sdpa`` multiplies
every query with every request's keys and masks what does not belong together: with n requests, n times the work, and a
mask of (queries x keys). Flash kernels skip that on a GPU. On a CPU, two ways do:

- where every request decodes, the cache is read into one row per request, filled up to the longest, and one product
  serves them all;
- else, and where the lengths differ so much that most would be filling, requests are taken one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "lmbridge_segments"
_SHARED = "_lmbridge_batches"  # an attribute of the cache, so that what is remembered ends with it
_FILLING = 1.5  # how many times the keys may grow by filling up


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers' ``AttentionInterface``.

    Args:
        query: (1, heads, tokens of the step, head size).
        key, value: (1, key heads, tokens of the step, head size); the cache adds what went before.

    Returns:
        (1, tokens of the step, heads, head size), and no weights.
    """
    layer = _Layer(kwargs["cache"], module.layer_idx)
    batch = layer.batch(kwargs, query.dtype)
    if batch.filled is not None:
        index, mask = batch.filled
        key, value = (batch.rows(part) for part in layer.update(key, value, kwargs, index))
        return _decode(query, key, value, mask, scaling), None
    window = layer.window(module.config)
    key, value = layer.update(key, value, kwargs, batch.index)
    queries = torch.split(query, batch.queries, 2)
    keys, values = (torch.split(part, batch.keys, 2) for part in (key, value))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_attend(*part, scaling, window) for part in parts], dim=1), None


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One query per request. Heads that share a key head take the place of queries, which spares repeating the keys.

    Args:
        query: (1, heads, requests, head size).
        key, value: (requests, key heads, keys, head size).
        mask: (requests, 1, 1, keys), minus infinity where a request has no key, else 0.
    """
    _, heads, count, size = query.shape
    rows = query.transpose(1, 2).reshape(count, key.shape[1], -1, size)
    answer = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return answer.reshape(1, count, heads, size)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One request: its last tokens, as many as there are queries, attend to what is up to themselves."""
    queries, keys = query.shape[2], key.shape[2]
    plain = queries == keys and (window is None or keys <= window)
    mask = None if plain or queries == 1 else _mask(queries, keys, window, query.device)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain and queries > 1, scale=scaling, enable_gqa=grouped
    ).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(queries, keys): the queries are the last of the keys; with a window, each sees so many, itself included."""
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class _Batch:
    """Whose the keys of a step are; the same in all layers that share a part of the cache.

    Attributes:
        queries, keys: how many each request has, the new keys included.
        index: where the cache holds the keys, request after request; empty when no request has any from before.
        filled: the same index with one row per request, filled up to the longest, and its mask; None unless every
            request decodes and few places are filled.
    """

    def __init__(
        self, query_ends: torch.Tensor, key_ends: torch.Tensor, index: torch.Tensor, nothing: int, dtype: torch.dtype
    ) -> None:
        sizes = key_ends.diff()
        self.queries: list[int] = query_ends.diff().tolist()
        self.keys: list[int] = sizes.tolist()
        self.index = index
        self.filled: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shape = len(self.keys), max(self.keys)
        decodes = index.numel() and max(self.queries) == 1
        if decodes and self._shape[0] * self._shape[1] <= _FILLING * sum(self.keys):
            self._fill(key_ends[:-1, None], sizes[:, None], nothing, dtype)

    def _fill(self, starts: torch.Tensor, sizes: torch.Tensor, nothing: int, dtype: torch.dtype) -> None:
        places = torch.arange(self._shape[1], device=starts.device)
        there = places < sizes
        index = self.index[starts + places.where(there, 0)].where(there, nothing)
        mask = torch.zeros(self._shape, dtype=dtype, device=starts.device).masked_fill(~there, -torch.inf)
        self.filled = index.flatten(), mask[:, None, None]

    def rows(self, part: torch.Tensor) -> torch.Tensor:
        """From (1, key heads, requests * longest, head size) to (requests, key heads, longest, head size)."""
        _, heads, _, size = part.shape
        return part[0].transpose(0, 1).view(*self._shape, heads, size).transpose(1, 2)


class _Layer:
    """One layer's part of the cache; what differs between transformers' versions is here."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self._old = hasattr(cache, "layer_index_to_group_indices")  # transformers before 5.18
        if self._old:
            self._group = cache.layer_index_to_group_indices[layer][0]
            self._sliding = cache.sliding_windows[layer] != 1
            self._nothing: int = cache.read_trash_index
        else:
            allocator = cache.layer_to_allocator[layer]
            self._group = allocator.index
            self._sliding = allocator.layer_type == "sliding_attention"
            self._nothing = allocator.read_trash_index

    def window(self, config: Any) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all."""
        return int(config.sliding_window) if self._sliding else None

    def batch(self, kwargs: dict[str, Any], dtype: torch.dtype) -> _Batch:
        """What is known of the step, found out by its first layer.

        A step is told from the one before by its list of indices, which is new in each and held here.
        """
        indices = kwargs["read_index"]
        known: tuple[Any, dict[int, _Batch]] = getattr(self._cache, _SHARED, (None, {}))
        if known[0] is not indices:
            known = indices, {}
            setattr(self._cache, _SHARED, known)
        batch = known[1].get(self._group)
        if batch is None:
            ends = kwargs["cu_seq_lens_k"]
            if isinstance(ends, dict):
                ends = ends["sliding_attention" if self._sliding else "full_attention"]
            index = indices[self._group]
            batch = known[1][self._group] = _Batch(kwargs["cu_seq_lens_q"], ends, index, self._nothing, dtype)
        return batch

    def update(
        self, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any], index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new keys and values, and read what is at ``index``: (1, key heads, places, head size)."""
        indices = [index if group == self._group else other for group, other in enumerate(kwargs["read_index"])]
        if self._old:
            key, value = self._cache.update(key, value, self._layer, indices, kwargs["write_index"])
            return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
        key, value = self._cache.update(key, value, self._layer, {**kwargs, "read_index": indices})
        return key, value
