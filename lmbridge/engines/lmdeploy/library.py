"""What of LMDeploy the engine relies on, checked before anything is loaded.

Rule: LMDeploy is imported inside the functions only, on the engine's worker thread. Nothing here runs a model. What is
named here is everything that the other files touch, so that a changed LMDeploy is reported by name at the start
not in the middle of a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.parts import missing_fields, missing_members, missing_parameters, reaches
from lmbridge.errors import MissingDependencyError

OLDEST = (0, 16)

PARAMETERS = {
    "lmdeploy.archs:autoget_backend": ("model_path", "trust_remote_code"),
    "lmdeploy.archs:autoget_backend_config": ("model_path", "backend_config", "trust_remote_code"),
    "lmdeploy.archs:get_task": ("backend", "model_path", "trust_remote_code", "backend_config"),
    "lmdeploy.utils:get_model": ("pretrained_model_name_or_path", "download_dir", "revision"),
    "lmdeploy.serve.core:AsyncEngine": (
        "model_path", "backend", "backend_config", "chat_template_config", "trust_remote_code",
    ),
    "lmdeploy.serve.core:AsyncEngine.start_loop": ("loop", "use_async_api"),
    "lmdeploy.serve.core:AsyncEngine.preprocess": (
        "messages", "session_id", "gen_config", "do_preprocess", "input_ids", "tools", "chat_template_kwargs",
        "adapter_name",
    ),
    "lmdeploy.serve.core:AsyncEngine.generate": ("request", "stream_response"),
    "lmdeploy.serve.core:AsyncEngine.stop_all_session": (),
    "lmdeploy.serve.core:AsyncEngine.close": (),
    "lmdeploy.serve.managers:SessionManager.get": ("session_id",),
    "lmdeploy.serve.managers:SessionManager.remove": ("session",),
    "lmdeploy.serve.managers:Session.async_abort": (),
    "lmdeploy.pytorch.engine.request:RequestManager.stop_loop": (),
    "lmdeploy.pytorch.engine:Engine.get_schedule_metrics": (),
}  # fmt: skip
"""Callable to the parameters given to it."""

FIELDS = {
    "lmdeploy:GenerationConfig": (
        "max_new_tokens", "do_sample", "top_p", "top_k", "min_p", "temperature", "repetition_penalty", "ignore_eos",
        "random_seed", "stop_token_ids", "skip_special_tokens", "logprobs",
    ),
    "lmdeploy:PytorchEngineConfig": (
        "device_type", "dtype", "max_batch_size", "max_prefill_token_num", "session_len", "cache_max_entry_count",
        "block_size", "num_gpu_blocks", "tp", "revision", "enable_metrics", "logprobs_mode",
    ),
    "lmdeploy:TurbomindEngineConfig": (
        "dtype", "max_batch_size", "max_prefill_token_num", "session_len", "cache_max_entry_count",
        "cache_block_seq_len", "tp", "revision", "enable_metrics",
    ),
    "lmdeploy.serve.core.async_engine:GenOut": ("response", "token_ids", "logprobs", "finish_reason"),
    "lmdeploy.serve.core.async_engine:PreprocessedRequest": ("session", "inputs", "input_token_len", "gen_config"),
    "lmdeploy.messages:ScheduleMetrics": ("active_seqs", "waiting_seqs", "cache_usage", "scheduler_tick"),
}  # fmt: skip
"""Dataclass to the fields read or set."""

MEMBERS = {
    "lmdeploy.serve.core.exceptions:ErrorCode": (
        "INVALID_REQUEST", "CONTEXT_LENGTH_EXCEEDED", "UNSUPPORTED_FEATURE", "PREPROCESS_FAILED", "ENGINE_UNAVAILABLE",
    ),
    "lmdeploy.serve.core.exceptions:RequestError": (),
}  # fmt: skip
"""Class to the names of its members."""


ATTRIBUTES = (
    "backend", "backend_config", "engine", "epoch", "hf_cfg", "session_len", "session_mgr.request_handle_pool.size",
    "stop_words", "tokenizer.model.model",
)  # fmt: skip
"""Members of a built engine."""

PYTORCH_ATTRIBUTES = (
    "engine._loop_main", "engine.max_session_len", "engine.req_manager._loop_task",
    "engine.req_manager._sender_wait_task",
)  # fmt: skip
"""Further members of the PyTorch engine in this process."""


def import_library() -> None:
    """Check that LMDeploy is installed and has what the engine relies on.

    Raises:
        MissingDependencyError: it is not installed, too old, or has changed; the message names what is missing.
    """
    try:
        lmdeploy = importlib.import_module("lmdeploy")
        importlib.import_module("lmdeploy.serve.core")
    except ImportError as cause:
        raise MissingDependencyError(
            f"The LMDeploy engine needs lmdeploy >= 0.16 ({cause}); install it with: pip install 'lmbridge[lmdeploy]'"
        ) from cause
    version = lmdeploy.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise MissingDependencyError(f"lmdeploy {version} is too old; upgrade it: pip install 'lmdeploy>=0.16'")
    _refuse(list(missing_parts()))


def check_engine(core: Any) -> None:
    """Raise MissingDependencyError unless the built engine has everything relied on."""
    local = core.backend == "pytorch" and not hasattr(core.engine, "proc")
    paths = (*ATTRIBUTES, *PYTORCH_ATTRIBUTES) if local else ATTRIBUTES
    _refuse([f"{type(core).__name__}.{path}" for path in paths if not reaches(core, path)])


def missing_parts() -> Iterator[str]:
    """The names of what the installed LMDeploy lacks."""
    yield from missing_parameters(PARAMETERS)
    yield from missing_fields(FIELDS)
    yield from missing_members(MEMBERS)


def _refuse(missing: list[str]) -> None:
    if missing:
        import lmdeploy

        raise MissingDependencyError(
            f"lmdeploy {lmdeploy.__version__} lacks what this adapter relies on: {', '.join(missing)}. Use a version "
            "it was tested with (pip install 'lmdeploy==0.18.0'), or a newer lmbridge."
        )
