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
    past = _Past(kwargs["cache"], module.layer_idx, kwargs)
    sizes = past.sizes
    count, longest = len(sizes), max(sizes)
    if query.shape[2] == count and past.index.numel() and count * longest <= _FILLING * sum(sizes):
        return _decode(query, *past.read_filled(key, value, longest), scaling), None
    window = past.window(module.config)
    queries = query.split(kwargs["cu_seq_lens_q"].diff().tolist(), 2)  # type: ignore[no-untyped-call]
    key, value = past.read(key, value)
    keys, values = (part.split(sizes, 2) for part in (key, value))  # type: ignore[no-untyped-call]
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_attend(*part, scaling, window) for part in parts], dim=1), None


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One query per request. Heads that share a key head take the place of queries, which spares repeating the keys.

    Args:
        query: (1, heads, requests, head size).
        key, value: (requests, key heads, keys, head size).
        mask: (requests, 1, 1, keys), False where a request has no key.
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
    mask = None if plain or queries == 1 else _mask(queries, keys, window)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain and queries > 1, scale=scaling, enable_gqa=grouped
    ).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _mask(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """(queries, keys): the queries are the last of the keys; with a window, each sees so many, itself included."""
    distance = torch.arange(keys - queries, keys).unsqueeze(-1) - torch.arange(keys)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class _Past:
    """One layer's cache in one step; what differs between transformers' versions is here.

    Attributes:
        sizes: how many keys each request has, the new ones included.
        index: where the cache holds them, request after request; empty when no request has any from before.
    """

    def __init__(self, cache: Any, layer: int, kwargs: dict[str, Any]) -> None:
        self._cache, self._layer, self._kwargs = cache, layer, kwargs
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
        ends = kwargs["cu_seq_lens_k"]
        if isinstance(ends, dict):
            ends = ends["sliding_attention" if self._sliding else "full_attention"]
        self._sizes: torch.Tensor = ends.diff()
        self._starts: torch.Tensor = ends[:-1]
        self.sizes: list[int] = self._sizes.tolist()
        self.index: torch.Tensor = kwargs["read_index"][self._group]

    def window(self, config: Any) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all."""
        return int(config.sliding_window) if self._sliding else None

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new keys and values, and read them with those from before: (1, key heads, all keys, head size)."""
        return self._update(key, value, self.index)

    def read_filled(
        self, key: torch.Tensor, value: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same with one row per request, (requests, key heads, longest, head size), and where a row has keys."""
        places = torch.arange(longest)
        there = places < self._sizes.unsqueeze(-1)
        index = self.index[self._starts.unsqueeze(-1) + places.where(there, 0)].where(there, self._nothing)
        key, value = self._update(key, value, index.flatten())
        _, heads, _, size = key.shape
        shape = (len(self.sizes), longest, heads, size)
        key, value = (part[0].transpose(0, 1).view(shape).transpose(1, 2) for part in (key, value))
        return key, value, there[:, None, None]

    def _update(self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = [index if group == self._group else other for group, other in enumerate(self._kwargs["read_index"])]
        if self._old:
            key, value = self._cache.update(key, value, self._layer, indices, self._kwargs["write_index"])
            return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
        key, value = self._cache.update(key, value, self._layer, {**self._kwargs, "read_index": indices})
        return key, value
