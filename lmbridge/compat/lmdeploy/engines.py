"""Which engine a pipeline runs on, and with which options.

Rule: the caller's thread, before anything is loaded. LMDeploy is imported only if it is used.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from lmbridge.compat.lmdeploy.convert import common_options, lmdeploy_chat_template, lmdeploy_engine_config
from lmbridge.engines import engine_names
from lmbridge.engines.auto import AUTO
from lmbridge.engines.models import DEMO
from lmbridge.errors import InvalidRequestError, MissingDependencyError, UnsupportedOptionError


def choose_engine(
    model: Any, backend: str | None, backend_config: Any, given: dict[str, Any], trust: bool, log_level: str
) -> tuple[str, dict[str, Any]]:
    """Choose the engine's name and its options.

    Args:
        backend: an engine's name; None means transformers for the bundled model, otherwise LMDeploy.
        given: pipeline's other configs by name, None for those not given.

    Raises:
        MissingDependencyError: LMDeploy is needed and not installed.
        UnsupportedOptionError: the engine does not support an argument; the message names it.
        InvalidRequestError: a config is of the wrong type.
    """
    names = (AUTO, *engine_names())
    if backend not in (None, *names):
        raise InvalidRequestError(f"backend must be None or one of {', '.join(names)}, not {backend!r}.", "backend")
    logging.getLogger("lmbridge").setLevel(log_level)
    if not hasattr(model, "__fspath__") and not isinstance(model, str):  # an engine of the caller's own
        _refuse_given({"backend": backend, "backend_config": backend_config, **given}, "an engine of your own")
        return "transformers", {}
    if backend == "transformers" or (backend is None and model == DEMO):
        _refuse_given(given, "the transformers engine")
        return "transformers", {**common_options(backend_config), "trust_remote_code": trust}
    if backend not in (None, "lmdeploy"):
        _refuse_given(given, f"the engine {backend!r}")
        return backend, {**common_options(backend_config), **({"trust_remote_code": True} if trust else {})}
    template = given.pop("chat_template_config")
    _refuse_given(given, "the LMDeploy engine")
    library = _import_lmdeploy()
    options = {"trust_remote_code": trust, "log_level": log_level}
    if backend_config is not None:
        options["backend_config"] = lmdeploy_engine_config(backend_config, library)
    if template is not None:
        options["chat_template_config"] = lmdeploy_chat_template(template, library)
    return "lmdeploy", options


def _import_lmdeploy() -> Any:
    from lmbridge.engines.lmdeploy.library import import_library

    try:
        import_library()  # checks that it is installed and has what the engine needs
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"{error}. To run on transformers instead, add backend='transformers' to the call of pipeline(), or "
            "--engine transformers to `lmbridge run`."
        ) from error
    return importlib.import_module("lmdeploy")


def _refuse_given(given: dict[str, Any], where: str) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UnsupportedOptionError(f"{where} does not support {', '.join(names)}; leave it out.", names[0])
