"""LMDeploy's engine, loaded, and what it says of itself.

Rule: ``load`` runs on the engine's worker thread, the rest on the server thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

from lmbridge.engines.lmdeploy.library import check_engine, import_library
from lmbridge.engines.lmdeploy.options import LMDeployOptions, build_config
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
    with _told_exit(logger), _without_main:
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
    """How many tokens the model knows; an id beyond them would end a CUDA context for everyone."""
    config = core.hf_cfg
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


class _WithoutMain:
    """While entered, the processes that LMDeploy starts (its look at the GPU, its ranks) do not run the user's script.

    A spawned process imports the script first, and one without the ``__main__`` guard would build its engine in there.
    LMDeploy's need nothing of it, and multiprocessing leaves a main module alone whose name ends in ``__main__``. The
    danger: a process that the user's own threads spawn meanwhile does not find the script's functions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0  # guarded by _lock, as is the next; two engines may load at once
        self._spec: ModuleSpec | None = None

    def __enter__(self) -> None:
        with self._lock:
            main = sys.modules["__main__"]
            if self._entered == 0:
                self._spec, main.__spec__ = main.__spec__, ModuleSpec("lmbridge.__main__", None)
            self._entered += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                sys.modules["__main__"].__spec__ = self._spec


_without_main = _WithoutMain()


@contextlib.contextmanager
def _told_exit(logger: logging.Logger) -> Iterator[None]:
    """Make an error of LMDeploy's ``exit(1)``, with what it has logged as the reason."""
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
