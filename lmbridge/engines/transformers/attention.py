"""Attention over a packed batch in which each request sees only itself, for CPUs: the second of two seams into
undocumented parts of transformers.

Rule: runs on the generation thread, inside the model's forward, once per layer; ``install`` on the worker thread. What
is known here of the keywords of a packed batch is named in ``library.ATTENTION``, which is checked first. Where it does
not fit, transformers' own attention serves.

A step of continuous batching packs the tokens of all requests into one row, and the cache hands over the keys of all of
them in the same order. transformers' own ``sdpa`` repeats the keys for every head that shares them, multiplies every
query with every request's keys, and masks what does not belong together: with n requests, n times the work. Flash
kernels skip that on a GPU. On a CPU, one call per request would do, but short calls cost more than their work; so
neighbours that decode share a call, as many as have ``_KEYS`` keys together, under a mask of their own. Keys are
sliced, never copied, and heads that share a key head take the place of queries.

A keyword that is not known here may change the result (a soft cap, sinks, a bias): it is refused, never ignored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

NAME = "lmbridge_paged"
_PLANS = (
    "_lmbridge_plans"  # an attribute of the step's ``cu_seq_lens_k``, so that what is remembered ends with the step
)
_KEYS = 384  # of one call: more are masked work, fewer are more calls (measured: flat from 256 to 640)
_KNOWN = frozenset(
    {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "read_index",
        "write_index",
        "logits_indices",
        "logits_processor_args",
        "is_causal",
        "position_ids",
        "use_cache",
        "sliding_window",
    }
)


def install(model: Any) -> None:
    """Make the model attend this way. Call it after making its manager, which refuses unknown names, and before the
    cache, which makes a mask for transformers' own attention.
    """
    transformers.AttentionInterface.register(NAME, segment_attention)
    model.set_attn_implementation(NAME)


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
        key, value: (1, key heads, keys of the step, head size): request after request, each with what the cache had
            of it and its new tokens last.

    Returns:
        (1, tokens of the step, heads, value size), and no weights.

    Raises:
        NotImplementedError: the model needs something not supported here.
    """
    _refuse(attention_mask, dropout, kwargs)
    heads, tokens = query.shape[1:3]
    shared = heads // key.shape[1]
    plan = _plan(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], shared, query.dtype)
    if (tokens, key.shape[2]) != (plan.tokens, plan.keys):
        raise NotImplementedError(f"{key.shape[2]} keys for {tokens} tokens, where {plan.keys} for {plan.tokens} fit")
    rows = _by_key_head(query, key.shape[1]) if plan.decodes else query
    answers = []
    for part in plan.parts:
        keys, values = key[:, :, part.keys], value[:, :, part.keys]
        if part.decodes:
            answer = scaled_dot_product_attention(
                rows[:, :, part.rows], keys, values, attn_mask=part.mask, scale=scaling
            )
            answers.append(answer)
        else:
            answer = _prefill(query[:, :, part.tokens], keys, values, scaling, _window(module))
            answers.append(_by_key_head(answer, key.shape[1]) if plan.decodes else answer)
    whole = torch.cat(answers, dim=2)
    return _by_token(whole, shared) if plan.decodes else whole.transpose(1, 2), None


def _refuse(attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    wanted = {name for name, value in kwargs.items() if value is not None} - _KNOWN
    if attention_mask is not None:
        wanted.add("attention_mask")
    if dropout:
        wanted.add("dropout")
    if kwargs.get("is_causal") is False:
        wanted.add("is_causal=False")
    if wanted:
        raise NotImplementedError(f"the attention {NAME!r} does not know {', '.join(sorted(wanted))}")


def _by_key_head(query: torch.Tensor, key_heads: int) -> torch.Tensor:
    """From (1, heads, tokens, size) to (1, key heads, tokens * heads of a key head, size), token after token."""
    _, heads, tokens, size = query.shape
    return query.view(1, key_heads, heads // key_heads, tokens, size).transpose(2, 3).reshape(1, key_heads, -1, size)


def _by_token(rows: torch.Tensor, shared: int) -> torch.Tensor:
    """From (1, key heads, tokens * shared, size) to (1, tokens, heads, size)."""
    _, key_heads, count, size = rows.shape
    tokens = count // shared
    return rows.view(1, key_heads, tokens, shared, size).transpose(1, 2).reshape(1, tokens, -1, size)


def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One request: its last tokens, as many as there are queries, attend to what is up to themselves."""
    queries, keys = query.shape[2], key.shape[2]
    plain = queries == keys and (window is None or keys <= window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if plain else _causal(queries, keys, window, query.device),
        is_causal=plain,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@functools.lru_cache(maxsize=8)
def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(queries, keys): the queries are the last of the keys; with a window, each sees so many, itself included."""
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _window(module: Any) -> int | None:
    """How many tokens a token of this layer sees, itself included; None for all. Read as the cache reads it."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = window is not None if kinds is None else kinds[module.layer_idx] == "sliding_attention"
    return int(window) if sliding and window is not None else None


@dataclass(frozen=True)
class _Part:
    """What one call serves: one request with several new tokens, or neighbours with one each.

    Attributes:
        tokens, rows, keys: where they are among the tokens, the rows of ``_by_key_head`` and the keys of the step.
        mask: (1, 1, rows, keys), minus infinity where a row has no business, else 0; None where there is one request.
    """

    decodes: bool
    tokens: slice
    rows: slice
    keys: slice
    mask: torch.Tensor | None


class _Plan:
    """The calls of a step; the same in all its layers of a kind."""

    def __init__(self, query_ends: torch.Tensor, key_ends: torch.Tensor, shared: int, dtype: torch.dtype) -> None:
        self._query_ends: list[int] = query_ends.tolist()
        self._key_ends: list[int] = key_ends.tolist()
        self.tokens, self.keys = self._query_ends[-1], self._key_ends[-1]
        self._shared, self._dtype = shared, dtype
        requests = torch.arange(len(self._key_ends) - 1, device=key_ends.device)
        self._of_key = requests.repeat_interleave(key_ends.diff(), output_size=self.keys)
        self._of_row = requests.repeat_interleave(shared)[:, None]
        self.parts = list(map(self._part, *zip(*self._groups(), strict=True)))
        self.decodes = any(part.decodes for part in self.parts)

    def _groups(self) -> list[tuple[int, int]]:
        """Requests [first, end): one that prefills, or neighbours that decode and have few enough keys together."""
        groups: list[tuple[int, int]] = []
        open_since: int | None = None  # the first key of the group that may still grow
        for number, keys_end in enumerate(self._key_ends[1:]):
            decodes = self._query_ends[number + 1] - self._query_ends[number] == 1
            if decodes and open_since is not None and keys_end - open_since <= _KEYS:
                groups[-1] = groups[-1][0], number + 1
                continue
            groups.append((number, number + 1))
            open_since = self._key_ends[number] if decodes else None
        return groups

    def _part(self, first: int, end: int) -> _Part:
        tokens = slice(self._query_ends[first], self._query_ends[end])
        keys = slice(self._key_ends[first], self._key_ends[end])
        rows = slice(tokens.start * self._shared, tokens.stop * self._shared)
        mask = None
        if end - first > 1:
            own = self._of_key[keys] == self._of_row[first * self._shared : end * self._shared]
            mask = torch.where(own, 0.0, -torch.inf).to(self._dtype)[None, None]
        return _Part(tokens.stop - tokens.start == end - first, tokens, rows, keys, mask)


def _plan(query_ends: torch.Tensor, key_ends: torch.Tensor, shared: int, dtype: torch.dtype) -> _Plan:
    """The plan of the step, made by its first layer of a kind.

    A step is told from the one before by its tensor of ends, which is new in each and the same in all layers of a kind.
    """
    plans: dict[tuple[int, torch.dtype], _Plan] | None = getattr(key_ends, _PLANS, None)
    if plans is None:
        plans = {}
        setattr(key_ends, _PLANS, plans)
    plan = plans.get((shared, dtype))
    if plan is None:
        plan = plans[shared, dtype] = _Plan(query_ends, key_ends, shared, dtype)
    return plan
