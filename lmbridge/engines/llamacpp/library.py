"""What of xllamacpp the engine relies on, checked before anything is loaded.

Rule: xllamacpp is imported inside the functions only, on the engine's worker thread. What is named here is everything
that the other files touch, so that a changed xllamacpp is reported by name at the start.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.parts import missing_members
from lmbridge.errors import MissingDependencyError

INSTALL = 'pip install "lmbridge[llamacpp]"'
TRIED = "2026.10.11549"
_WAITING = "GOMP_SPINCOUNT"
_TURNS = "1000"

MEMBERS = {
    "xllamacpp:Server": (
        "handle_chat_completions", "handle_completions", "handle_embeddings", "handle_rerank", "handle_metrics",
        "listening_address",
    ),
    "xllamacpp:CommonParams": (
        "model", "n_ctx", "n_parallel", "n_batch", "n_ubatch", "n_gpu_layers", "cpuparams", "cpuparams_batch",
        "api_keys", "ui", "endpoint_slots", "endpoint_metrics", "prefill_assistant", "cache_ram_mib", "kv_unified",
        "embedding", "pooling_type", "verbosity", "ctx_shift", "warmup",
    ),
    "xllamacpp:CommonParamsModel": ("path",),
    "xllamacpp:CpuParams": ("n_threads",),
    "xllamacpp:llama_pooling_type": ("LLAMA_POOLING_TYPE_RANK", "LLAMA_POOLING_TYPE_MEAN"),
}  # fmt: skip
"""Class to the names of its members."""

PROPERTIES = ("default_generation_settings.n_ctx", "chat_template_caps.supports_tools")
"""The properties that llama.cpp's server reports."""


def import_library() -> Any:
    """xllamacpp, checked for what the engine relies on.

    Raises:
        MissingDependencyError: it is not installed, or has changed; the message names what is missing.
    """
    try:
        with _sparing_threads():
            library = importlib.import_module("xllamacpp")
    except ImportError as cause:
        raise MissingDependencyError(
            f"The llama.cpp engine needs xllamacpp ({cause}); install it with: {INSTALL}"
        ) from cause
    refuse(list(missing_members(MEMBERS)))
    return library


def refuse(missing: list[str]) -> None:
    """Raise MissingDependencyError where something is missing."""
    if missing:
        version = getattr(importlib.import_module("xllamacpp"), "__version__", "")
        raise MissingDependencyError(
            f"xllamacpp {version} lacks what this adapter relies on: {', '.join(missing)}. Use the version it was "
            f"tested with (pip install 'xllamacpp=={TRIED}'), or a newer lmbridge."
        )


@contextlib.contextmanager
def _sparing_threads() -> Iterator[None]:
    """Make OpenMP's threads, if loaded inside, spin 1,000 instead of 300,000 times when they wait for each other.

    They meet a few hundred times per token. If another program keeps one of them from its core, the others spin that
    long each time, on cores that are needed: two threads on two busy cores made 2 to 9 tokens/s, and 20 to 30 with
    this, as one thread does. On idle cores it costs nothing. OpenMP reads the setting only when it is loaded.
    """
    if _WAITING in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[_WAITING] = _TURNS
    try:
        yield
    finally:
        os.environ.pop(_WAITING, None)
