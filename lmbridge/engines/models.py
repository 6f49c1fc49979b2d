"""What the name of a model means: the bundled one, a folder, a GGUF file, or a hub id.

Rule: standard library only, loads and fetches nothing; any thread.
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lmbridge.errors import InvalidRequestError, ModelNotFoundError

logger = logging.getLogger("lmbridge.loading")

DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo_model"
GGUF = ".gguf"
_MOST_NEIGHBOURS = 1_000  # entries of a folder searched for a name to suggest


def find_model(name: str | os.PathLike[str]) -> str:
    """What to load for ``name``: the path of a folder or ``.gguf`` file, or the hub id unchanged.

    ``"demo"`` is the bundled model. Anything that exists on disk or looks like a path is a folder or a ``.gguf`` file;
    anything else is a hub id, with at most one slash (``gpt2``, ``Qwen/Qwen3-0.6B``). If a folder's only weights are
    one ``.gguf`` file, that file is the model.

    Raises:
        ModelNotFoundError: the folder does not exist, or holds no model, an adapter without its base, or several
            ``.gguf`` files.
        InvalidRequestError: the name is empty or not a string.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InvalidRequestError(f"model must be 'demo', a folder or a hub id, not {name!r}.", param="model")
    if name == DEMO:
        return _model_at(DEMO_FOLDER, "The bundled model is missing from this installation")
    text = os.path.expanduser(os.fspath(name))
    if not isinstance(name, str) or _looks_like_path(os.fspath(name)) or os.path.exists(text):
        return _model_at(Path(text), f"The model {os.fspath(name)!r} looks like a folder")
    return text


def announce(model: str) -> None:
    """Log that the hub will be asked for ``model``, which may take a while, unless it is on this disk.

    A warning if a similar name exists, since this one is probably mistyped.
    """
    if not os.path.exists(model):
        hint = did_you_mean(model)
        logger.log(logging.WARNING if hint else logging.INFO, "no folder %r here; asking the hub…%s", model, hint)


def did_you_mean(name: str) -> str:
    """`` (did you mean 'demo'?)``, with the most similar loadable names, or ""."""
    path = Path(os.path.expanduser(name))
    known = {DEMO: DEMO, **{os.path.basename(found).lower(): found for found in _neighbours(path.parent)}}
    close = difflib.get_close_matches(path.name.lower(), known, n=2)
    return f" (did you mean {' or '.join(repr(known[match]) for match in close)}?)" if close else ""


def _neighbours(folder: Path) -> Iterator[str]:
    """Candidates in ``folder`` or by relative path: folders with a model, and GGUF files."""
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, _MOST_NEIGHBOURS):
                path = Path(entry.path)
                if path.suffix.lower() == GGUF or (path / "config.json").is_file() or _gguf_files(path):
                    yield os.path.normpath(path)
    except OSError:  # missing or unreadable folder
        return


def _looks_like_path(name: str) -> bool:
    if os.path.isabs(name) or name.startswith(("~", ".")) or name.count("/") > 1 or name.endswith("/"):
        return True
    return name.lower().endswith(GGUF) or (os.sep != "/" and os.sep in name)


def _model_at(path: Path, what: str) -> str:
    if not path.exists():
        if path.suffix.lower() == GGUF:
            raise ModelNotFoundError(f"The file {path} does not exist{did_you_mean(str(path))}; check the path.")
        raise ModelNotFoundError(
            f"{what}, but {path} does not exist{did_you_mean(str(path))}; check the path, or give a hub id."
        )
    if path.is_dir():
        return _model_in(path, what)
    if path.suffix.lower() == GGUF:
        return str(path)
    raise ModelNotFoundError(f"{what}, but {path} is a file; give the folder that holds config.json, or a .gguf file.")


def _model_in(folder: Path, what: str) -> str:
    if _has_weights(folder):
        ggufs = []
    else:
        _refuse_adapter(folder)
        ggufs = _gguf_files(folder)
    if len(ggufs) == 1:
        return str(folder / ggufs[0])
    if (folder / "config.json").is_file():
        return str(folder)
    if ggufs:
        raise ModelNotFoundError(
            f"{what}, but {folder} holds {len(ggufs)} .gguf files; give the path of one: {', '.join(ggufs)}."
        )
    raise ModelNotFoundError(f"{what}, but {folder} holds no config.json; give the folder the model was saved to.")


def _has_weights(folder: Path) -> bool:
    kinds = (".safetensors", ".bin")
    return any(name.endswith(kinds) and not name.startswith("adapter_") for name in _names(folder))


def _gguf_files(folder: Path) -> list[str]:
    return sorted(name for name in _names(folder) if name.lower().endswith(GGUF))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # missing or unreadable folder
        return []


def _refuse_adapter(folder: Path) -> None:
    """Raise ModelNotFoundError if the folder holds an adapter, which needs its base model."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return
    base = _base_model(settings)
    raise ModelNotFoundError(
        f"{folder} holds an adapter (LoRA) without its base model, {base}. Merge the two once and use the new folder: "
        "pip install peft, then: from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer; "
        f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged'); "
        f"AutoTokenizer.from_pretrained({base}).save_pretrained('merged')"
    )


def _base_model(settings: Path) -> str:
    """The base model's quoted name, or a placeholder if the file does not name it."""
    try:
        content = json.loads(settings.read_text("utf-8"))
    except (OSError, ValueError):
        content = None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return repr(base) if base else "BASE (which adapter_config.json does not name)"
