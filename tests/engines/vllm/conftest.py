"""Engines small enough for a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge.engines.vllm import VLLMEngine

QUIET = pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
"""vLLM leaves its sockets' context to be collected."""


def small(model: str = "demo", **options: Any) -> VLLMEngine:
    """The bundled model, without compiling, and in the one precision that every x86 CPU has."""
    engine_args = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, **options.pop("engine_args", {})}
    return VLLMEngine(model, **{"dtype": "float32", "max_batch_size": 4, "engine_args": engine_args, **options})
