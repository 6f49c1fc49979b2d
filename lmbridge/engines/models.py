"""What the name of a model means: the bundled one, a folder, or a hub id.

Rule: standard library only, and nothing is loaded or fetched; any thread may ask.
"""

from __future__ import annotations

import os
from pathlib import Path

from lmbridge.errors import InvalidRequestError, ModelNotFoundError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo_model"


def find_model(name: str | os.PathLike[str]) -> str:
    """What a library is to load for ``name``: a folder's path, or the hub id unchanged.

    ``"demo"`` is the bundled model. What exists on disk, or looks like a path, is a folder; the rest is a hub id, which
    has one slash at most (``gpt2``, ``Qwen/Qwen3-0.6B``).

    Raises:
        ModelNotFoundError: the folder does not exist, or holds no model.
        InvalidRequestError: the name is empty or no text.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InvalidRequestError(f"model must be 'demo', a folder or a hub id, not {name!r}.", param="model")
    if name == DEMO:
        return _model_folder(DEMO_FOLDER, "The bundled model is missing from this installation")
    text = os.path.expanduser(os.fspath(name))
    if not isinstance(name, str) or _looks_like_path(os.fspath(name)) or os.path.exists(text):
        return _model_folder(Path(text), f"The model {os.fspath(name)!r} is taken for a folder")
    return text


def _looks_like_path(name: str) -> bool:
    if os.path.isabs(name) or name.startswith(("~", ".")) or name.count("/") > 1 or name.endswith("/"):
        return True
    return os.sep != "/" and os.sep in name


def _model_folder(folder: Path, what: str) -> str:
    if not folder.exists():
        raise ModelNotFoundError(f"{what}, but {folder} does not exist; check the path, or give a hub id.")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{what}, but {folder} is a file; give the folder that holds config.json.")
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{what}, but {folder} holds no config.json; give the folder the model was saved to.")
    return str(folder)
