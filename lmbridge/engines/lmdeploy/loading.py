"""Loads LMDeploy's engine and reads its properties.

Rule: ``load`` runs on the engine's worker thread, the rest on the server thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.lmdeploy.library import check_engine, import_library
from lmbridge.engines.lmdeploy.options import LMDeployOptions, build_config
from lmbridge.engines.spawning import without_main
from lmbridge.errors import EngineStartError


def load(options: LMDeployOptions) -> Any:
    """LMDeploy's ``AsyncEngine`` for the model, not yet on any loop.

    Raises:
        MissingDependencyError: LMDeploy is missing, too old, or has changed.
        EngineStartError: it called ``exit``.
    """
    import_library()
    from lmdeploy.archs import get_task
    from lmdeploy.utils import get_logger, get_model

    logger = get_logger("lmdeploy")
    logger.setLevel(options.log_level)
    with _told_exit(logger), without_main:
        path = options.model
        if not os.path.exists(path):
            path = get_model(path, None, options.revision)
        backend, config = build_config(options, path)
        trust = options.trust_remote_code
        _, cls = get_task(backend, path, trust_remote_code=trust, backend_config=config)
        core = cls(
            path,
            backend=backend,
            backend_config=config,
            chat_template_config=options.chat_template_config,
            trust_remote_code=trust,
        )
    check_engine(core)
    return core


def room(core: Any) -> int:
    """The most tokens of one request; the PyTorch engine's cache may hold fewer than the context allows."""
    return int(min(core.session_len, getattr(core.engine, "max_session_len", None) or core.session_len))


def vocabulary_size(core: Any) -> int:
    """The model's vocabulary size; a larger id would crash the CUDA context for everyone."""
    config = core.hf_cfg
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


@contextlib.contextmanager
def _told_exit(logger: logging.Logger) -> Iterator[None]:
    """Turn LMDeploy's ``exit(1)`` into an error, with its log as the reason."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    except SystemExit as cause:
        reason = " ".join(errors) or "its log says why; it needs a CUDA device unless another is named"
        raise EngineStartError(f"LMDeploy called exit({cause.code}) while loading: {reason}") from cause
    finally:
        logger.removeHandler(handler)
