"""The size of the paged cache, and the share of one request.

Rule: worker thread, before a runner is built; nothing is allocated here. transformers counts in blocks of a page for
each layer, and hands them out by sectors that suit layers with and without a sliding window.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from transformers.generation import ContinuousBatchingConfig

from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.runner import NO_LIMIT, context_of

psutil: Any = importlib.import_module("psutil")  # untyped

CPU_PAGE, GPU_PAGE = 16, 256
CPU_CHUNK, GPU_CHUNK = 256, 2048
CPU_CACHE_SHARE, GPU_CACHE_SHARE = 0.1, 0.8
CPU_CACHE_LIMIT = 2 << 30
SAFETY = 0.15
"""The share of the cache reserved for decoding: no prompt starts in it."""
UNKNOWN_CONTEXT = 4096
"""Assumed tokens per request if the model states no limit."""


class CacheSizes:
    """The cache that suits a model, its options and the memory there is.

    Attributes:
        page: tokens in a page.
        chunk: tokens in a step.
        blocks: how many pages of all layers there are.
    """

    def __init__(self, model: Any, options: ModelOptions) -> None:
        self._config = model.config.get_text_config()
        self._context = context_of(model, options)
        self._rows = options.max_batch_size
        on_cpu = model.device.type == "cpu"
        self.page = options.page_size or (CPU_PAGE if on_cpu else GPU_PAGE)
        self.chunk = max(options.max_chunk_size or (CPU_CHUNK if on_cpu else GPU_CHUNK), self._rows)
        budget = _cpu_budget(options) if on_cpu else self._gpu_budget(model, options)
        per_block = self._bytes_per_token(model) * self.page
        wanted = -(-self._rows * (self._context or UNKNOWN_CONTEXT) // self.page)
        self.blocks = options.num_blocks or max(1, min(wanted, budget // per_block) if on_cpu else budget // per_block)

    def shrink(self) -> bool:
        """Shrink the cache; False if it cannot shrink further."""
        self.blocks = self.blocks * 3 // 4
        return self.blocks > 0

    def config(self, options: ModelOptions) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=self.blocks,
            max_batch_tokens=self.chunk,
            max_requests_per_batch=self._rows,
            use_cuda_graph=options.cuda_graphs,
            use_async_batching=False,
            safety_margin=SAFETY,
            auto_switch_to_flash=options.attn_implementation is None,
        )

    @property
    def room(self) -> int:
        """The most tokens that one request may have, so that it fits when it has the cache to itself again."""
        low, high = 0, (self._context or NO_LIMIT) // self.page + 1  # pages: those that fit, those that need not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle - 1)
        return min(low * self.page, self._context or NO_LIMIT)

    def _fits(self, pages: int) -> bool:
        """Whether a request of so many pages has room, however those who have left have scattered it over sectors."""
        layers, slides = self._layers()
        full = layers - slides
        sector = math.lcm(*(count for count in (full, slides) if count))  # in pages of one layer
        needed = -(-pages * full // sector)
        if slides:
            together = sector // slides if self._rows == 1 else 1  # of its blocks of sliding layers, in one sector
            needed += -(-min(pages, -(-self._config.sliding_window // self.page)) // together)
        return needed <= -(-self.blocks * layers // sector)

    def _layers(self) -> tuple[int, int]:
        """How many layers there are, and how many of them slide."""
        types = getattr(self._config, "layer_types", None)
        count: int = self._config.num_hidden_layers
        if types is not None:
            return count, sum(kind == "sliding_attention" for kind in types)
        return count, count if getattr(self._config, "sliding_window", None) is not None else 0

    def _bytes_per_token(self, model: Any) -> int:
        """What a token costs in the cache, and in what a step reads from it and masks of it."""
        config, size = self._config, model.dtype.itemsize
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cached: int = 2 * config.num_hidden_layers * heads * head_size * size
        read: int = (2 * config.num_attention_heads + heads) * head_size * size + 2 * self.chunk * size + 16
        return cached + read

    def _gpu_budget(self, model: Any, options: ModelOptions) -> int:
        """Bytes for the cache: a share of what is free now that the model is there, less what a step needs besides."""
        config, size = self._config, model.dtype.itemsize
        free = torch.cuda.mem_get_info(model.device)[0]
        step = self.chunk * (8 * config.hidden_size * size + 4 * config.vocab_size)
        budget: int = int(free * (options.cache_share or GPU_CACHE_SHARE)) - step
        return budget


def _cpu_budget(options: ModelOptions) -> int:
    """Bytes for the cache: a share of what is free, within a limit where none was asked for."""
    budget = int(psutil.virtual_memory().available * (options.cache_share or CPU_CACHE_SHARE))
    return budget if options.cache_share is not None else min(budget, CPU_CACHE_LIMIT)
