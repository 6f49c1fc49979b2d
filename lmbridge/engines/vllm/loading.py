"""vLLM's engine, loaded.

Rule: everything here runs on the engine's worker thread, without a loop: what vLLM puts on one begins with the first
request. What is put into the environment here is what nobody has set; vLLM's processes inherit it.
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
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would take along the locks that other threads hold
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for answers
}
_CACHE_ARGUMENTS = ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override")
_CPU_CACHE = 4 << 30
"""The most bytes of the cache on a CPU, where vLLM would take nine tenths of the machine's memory."""


def prepare() -> None:
    """Import vLLM.

    A call of its own: an error that some library met and kept while it was imported keeps all who had called it, and
    with ``load`` the engine that it made.

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
        InvalidRequestError: it has no such engine argument.
        Exception: what else vLLM raises when it cannot load the model.
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
    """A tokenizer of transformers of our own; vLLM's belongs to its threads.

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
    """The size of the cache on a CPU, where nobody has said anything of it."""
    from vllm.platforms import current_platform

    said = any(name in arguments for name in _CACHE_ARGUMENTS) or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
    if said or not current_platform.is_cpu():
        return {}
    return {"kv_cache_memory_bytes": min(_CPU_CACHE, psutil.virtual_memory().available // 4)}
