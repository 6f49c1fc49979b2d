"""Which engine a model is for, where nobody says: by what its name means on this machine.

Rule: standard library only; nothing is loaded or fetched, any thread may ask.
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
    """Whether the model is said to be on a server."""
    return model.lower().startswith(("http://", "https://"))


def shown_url(model: str) -> str:
    """The model as it may be shown: its URLs without the user and the password in them."""
    return _LOGIN.sub("://", model)


def engine_for(model: str) -> str:
    """The name of the engine that the model is for; what is not the usual one is logged.

    A URL is another server's, a ``.gguf`` file llama.cpp's where that is installed, a folder quantised for ExLlama is
    ExLlama's, and one of sentence-transformers the encoder's. All else is for transformers.

    Raises:
        ModelNotFoundError, InvalidRequestError: there is no such model, or the name is none.
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
            f"{model!r} is no folder here, and no hub has such names. A server's URL begins with http://; a function "
            "is named with engine='function'."
        )
    if found.lower().endswith(GGUF):
        if importlib.util.find_spec("xllamacpp") is not None:
            return "llamacpp", "a .gguf file"
        return USUAL, "a .gguf file, and no xllamacpp is installed"
    folder = Path(found)
    if (method := _quant_method(folder)) in _QUANTISED:
        return _QUANTISED[method], f"quantised as {method}"
    if (folder / "modules.json").is_file():
        return "encoder", "a model of sentence-transformers"
    return USUAL, ""


def _quant_method(folder: Path) -> str:
    """How the folder's model was quantised; "" where that is not said, or there is no such folder."""
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        return str(settings["quantization_config"]["quant_method"]).lower()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
