"""Engines small enough for a CPU; without a vLLM the modules that need one are left out.

``tests/engines/vllm/run.sh`` makes an environment with vLLM's build for CPUs and runs them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from lmbridge.engines.vllm import VLLMEngine

QUIET = pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
"""vLLM leaves its sockets' context to be collected."""
collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_answers.py", "test_contract.py", "test_life.py"]


def small(model: str = "demo", **options: Any) -> VLLMEngine:
    """The bundled model, without compiling, and in the one precision that every x86 CPU has."""
    engine_args = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, **options.pop("engine_args", {})}
    return VLLMEngine(model, **{"dtype": "float32", "max_batch_size": 4, "engine_args": engine_args, **options})
