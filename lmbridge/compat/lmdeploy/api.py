"""LMDeploy's ``pipeline`` function.

Rule: one function; ``Pipeline`` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmbridge.compat.lmdeploy.pipeline import Pipeline
from lmbridge.engines.base import Engine


def pipeline(
    model_path: str | Path | Engine | Callable[[], Engine],
    backend_config: Any = None,
    chat_template_config: Any = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: Any = None,
    allowed_media_domains: list[str] | None = None,
    *,
    backend: str | None = None,
    timeout: float | None = None,
    stall_timeout: float | None = 300.0,
    **engine_options: Any,
) -> Pipeline:
    """Load a model and return its Pipeline, which any number of threads may use.

    Args:
        model_path: a folder or a hub id; ``"demo"`` is the bundled model; an Engine, or a function that
            builds one.
        backend_config: a PytorchEngineConfig or a TurbomindEngineConfig, ours or LMDeploy's own.
        chat_template_config: a ChatTemplateConfig, ours or LMDeploy's own; for the LMDeploy engine.
        log_level: of LMDeploy's logger and ours, for the whole process.
        max_log_len: accepted; prompts are never logged.
        trust_remote_code: run code that comes with the model.
        speculative_config: refused; the engines do not decode speculatively.
        allowed_media_domains: refused; the engines would not keep to it.
        backend: ``"lmdeploy"`` or ``"transformers"``; None takes transformers for the bundled model, and else LMDeploy.
        timeout: default deadline of every call, in seconds; None waits forever.
        stall_timeout: seconds of silence after which an engine with work is taken for dead; None trusts it.
        engine_options: the engine's own options.

    Raises:
        MissingDependencyError: LMDeploy is to be used and is not installed; the message says how to install it.
        UnsupportedOptionError: the engine cannot honour what was given; the message names it.
        ModelNotFoundError, InvalidRequestError: what was given cannot work.
        EngineStartError: the model could not be loaded.
    """
    return Pipeline(
        model_path,
        backend_config,
        chat_template_config,
        log_level,
        max_log_len,
        trust_remote_code,
        speculative_config,
        allowed_media_domains,
        backend=backend,
        timeout=timeout,
        stall_timeout=stall_timeout,
        **engine_options,
    )
