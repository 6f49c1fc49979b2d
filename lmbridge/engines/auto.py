"""Chooses the engine for a model by what its name means on this machine.

Rule: standard library only; loads and fetches nothing; any thread.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from pathlib import Path

from lmbridge.engines.models import GGUF, find_model
from lmbridge.errors import ModelNotFoundError

logger = logging.getLogger("lmbridge.loading")

AUTO = "auto"
USUAL = "transformers"
_QUANTISED = {"exl2": "exllamav2", "exl3": "exllamav3"}  # quant_method in a model's config.json
_LOGIN = re.compile(r"://(?:(?!://).)*@", re.DOTALL)


def is_url(model: str) -> bool:
    """Whether the model's name is a URL."""
    return model.lower().startswith(("http://", "https://"))


def shown_url(model: str) -> str:
    """The model's name without the user names and passwords in its URLs."""
    return _LOGIN.sub("://", model)


def engine_for(model: str) -> str:
    """The name of the engine for the model; logs any choice but the default.

    A URL goes to the openai engine, a ``.gguf`` file to llama.cpp if that is installed, a folder quantised for ExLlama
    to ExLlama, one of sentence-transformers to the encoder, and everything else to transformers.

    Raises:
        ModelNotFoundError, InvalidRequestError: there is no such model, or the name is invalid.
    """
    engine, why = _chosen(model)
    if why:
        logger.info("%s: %s, so the engine is %r", shown_url(model), why, engine)
    return engine


def _chosen(model: str) -> tuple[str, str]:
    if is_url(model):
        return "openai", "a server"
    found = find_model(model)
    if ":" in found and not os.path.exists(found):
        raise ModelNotFoundError(
            f"{model!r} is not a folder here and cannot be a hub id. A server's URL begins with http://; for a "
            "function, add engine='function'."
        )
    if found.lower().endswith(GGUF):
        if importlib.util.find_spec("xllamacpp") is not None:
            return "llamacpp", "a .gguf file"
        return USUAL, "a .gguf file, and xllamacpp is not installed"
    folder = Path(found)
    if (method := _quant_method(folder)) in _QUANTISED:
        return _QUANTISED[method], f"quantised as {method}"
    if (folder / "modules.json").is_file():
        return "encoder", "a model of sentence-transformers"
    return USUAL, ""


def _quant_method(folder: Path) -> str:
    """The quantisation of the folder's model; "" if unknown, or there is no such folder."""
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        return str(settings["quantization_config"]["quant_method"]).lower()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
