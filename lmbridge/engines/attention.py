"""Attention over a packed batch, request by request, for CPUs.

Rule: torch only; runs on the generation thread, inside the model's forward, once per layer.

A step of continuous batching packs the tokens of all requests into one row. transformers' own ``sdpa`` multiplies every
query with every request's keys and masks what does not belong together: with n requests, n times the work and a mask of
(queries x keys). Flash kernels skip that on a GPU; on a CPU, one call per request does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "lmbridge_segments"


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
    layer = module.layer_idx
    cache = kwargs["cache"]
    window = _window(cache, layer, module.config)
    key, value, ends = _with_past(cache, layer, key, value, kwargs)
    outputs = []
    first_query = first_key = 0
    for last_query, last_key in zip(kwargs["cu_seq_lens_q"].tolist()[1:], ends[1:], strict=True):
        part = slice(first_key, last_key)
        outputs.append(
            _attend(query[:, :, first_query:last_query], key[:, :, part], value[:, :, part], scaling, window)
        )
        first_query, first_key = last_query, last_key
    return torch.cat(outputs, dim=1), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One request: its last tokens, as many as there are queries, attend to what is up to themselves."""
    _, heads, queries, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if queries == 1:  # the queries that share a key head become rows, which spares repeating the keys
        rows = query.reshape(1, key_heads, heads // key_heads, size)
        return scaled_dot_product_attention(rows, key, value, scale=scaling).view(1, 1, heads, size)
    plain = queries == keys and (window is None or keys <= window)
    answer = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if plain else _mask(queries, keys, window),
        is_causal=plain,
        scale=scaling,
        enable_gqa=heads != key_heads,
    )
    return answer.transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _mask(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """(queries, keys): the queries are the last of the keys; with a window, each sees so many, itself included."""
    distance = torch.arange(keys - queries, keys).unsqueeze(-1) - torch.arange(keys)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _window(cache: Any, layer: int, config: Any) -> int | None:
    """The layer's sliding window, as the cache sees it."""
    if hasattr(cache, "sliding_windows"):  # transformers before 5.18; 1 stands for none
        window = cache.sliding_windows[layer]
        return None if window == 1 else int(window)
    return int(config.sliding_window) if cache.layer_to_allocator[layer].layer_type == "sliding_attention" else None


def _with_past(
    cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Keys and values of all requests with what the cache holds of them, and where each request's begin."""
    if hasattr(cache, "sliding_windows"):
        key, value = cache.update(key, value, layer, kwargs["read_index"], kwargs["write_index"])
        ends = kwargs["cu_seq_lens_k"]
        if isinstance(ends, dict):
            ends = ends["full_attention" if cache.sliding_windows[layer] == 1 else "sliding_attention"]
        return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0), ends.tolist()
    key, value = cache.update(key, value, layer, kwargs)
    return key, value, kwargs["cu_seq_lens_k"].tolist()
