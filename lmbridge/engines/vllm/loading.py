"""Loads vLLM's engine.

Rule: everything here runs on the engine's worker thread, without a loop: vLLM's loop tasks begin with the first
request. Environment variables set here are ones that nobody has set; vLLM's processes inherit them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import psutil

from lmbridge.engines.spawning import without_main
from lmbridge.engines.vllm.library import check_engine, import_library
from lmbridge.engines.vllm.options import VLLMOptions
from lmbridge.errors import EngineStartError, InvalidRequestError

_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy locks held by other threads
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for answers
}
_CACHE_ARGUMENTS = ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override")
_CPU_CACHE = 4 << 30
"""The most cache bytes on a CPU; vLLM's default is nine tenths of the machine's memory."""


def prepare() -> None:
    """Import vLLM.

    A separate call: an error that a library caught and stored during import keeps all callers' frames alive, and with
    ``load`` the engine.

    Raises:
        MissingDependencyError: vLLM is missing, or has changed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import_library()


def load(options: VLLMOptions) -> Any:
    """vLLM's ``AsyncLLM`` for the model, its engine process running, and nothing yet on any loop.

    Raises:
        MissingDependencyError: vLLM has changed.
        InvalidRequestError: vLLM has no such engine argument.
        Exception: whatever else vLLM raises while loading the model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = options.arguments()
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in arguments:
        if name not in known:
            raise InvalidRequestError(f"vLLM has no engine argument {name!r}.", param="engine_args")
    with without_main:
        core = AsyncLLM.from_engine_args(AsyncEngineArgs(**_cache_on_cpu(arguments), **arguments))
    try:
        check_engine(core)
    except BaseException:
        core.shutdown(timeout=0)
        raise
    return core


def load_tokenizer(core: Any) -> Any:
    """Our own transformers tokenizer; vLLM's belongs to its threads.

    Raises:
        EngineStartError: there is none.
    """
    from transformers import AutoTokenizer

    config = core.model_config
    try:
        return AutoTokenizer.from_pretrained(
            config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as cause:
        raise EngineStartError(f"transformers has no tokenizer for {config.tokenizer}: {cause}") from cause


def _cache_on_cpu(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The default cache size on a CPU."""
    from vllm.platforms import current_platform

    said = any(name in arguments for name in _CACHE_ARGUMENTS) or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
    if said or not current_platform.is_cpu():
        return {}
    return {"kv_cache_memory_bytes": min(_CPU_CACHE, psutil.virtual_memory().available // 4)}
