"""The llama.cpp engine's options, validated when it is created, and the parameters they make.

Rule: xllamacpp is not imported here; the caller passes its parameters.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from lmbridge.engines.llamacpp.header import Header
from lmbridge.errors import InvalidRequestError
from lmbridge.values import as_int

USUAL_CONTEXT = 4096
_LEAST = {"max_batch_size": 1, "max_chunk_size": 1, "max_context": 2, "threads": 1, "gpu_layers": 0}
_TASKS = ("auto", "generate", "embed", "rerank")


@dataclass(frozen=True)
class LlamaCppOptions:
    """An engine's options; the engine class documents each.

    Raises:
        InvalidRequestError: a value is invalid; ``param`` names the option.
    """

    path: str
    task: str = "auto"
    max_batch_size: int = 8
    max_chunk_size: int = 256
    max_context: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (as_int(value) is None or value < least):
                raise InvalidRequestError(f"{name} must be an int >= {least}, not {value!r}.", param=name)
        if self.task not in _TASKS:
            raise InvalidRequestError(f"task must be one of {', '.join(_TASKS)}, not {self.task!r}.", param="task")

    def context(self, header: Header) -> int:
        """The most tokens of one request."""
        return min(self.max_context or USUAL_CONTEXT, header.context or self.max_context or USUAL_CONTEXT)


def fill(params: Any, options: LlamaCppOptions, header: Header, task: str, poolings: Any) -> str:
    """Set llama.cpp's parameters; returns the API key of its HTTP server, which cannot be disabled."""
    context, key = options.context(header), secrets.token_hex(32)
    params.model.path = options.path
    params.n_parallel = options.max_batch_size
    params.n_ctx = context * options.max_batch_size  # each slot has its own part of it
    params.kv_unified = params.ctx_shift = False
    params.n_batch = params.n_ubatch = options.max_chunk_size if task == "generate" else context  # a whole text
    params.cache_ram_mib = 0  # else up to 8 GiB of memory for prompts that may never come again
    params.prefill_assistant = False  # else it continues a conversation's last answer unasked
    params.embedding = task != "generate"
    if task == "rerank":
        params.pooling_type = poolings.LLAMA_POOLING_TYPE_RANK
    elif task == "embed" and not header.pooling:
        params.pooling_type = poolings.LLAMA_POOLING_TYPE_MEAN
    params.warmup = False  # it would hold the GIL; the engine's own first request warms up too
    params.api_keys, params.ui, params.endpoint_slots = [key], False, False
    params.endpoint_metrics = True  # the one request that is answered between two steps
    if options.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    if options.gpu_layers is not None:
        params.n_gpu_layers = options.gpu_layers
    return key
