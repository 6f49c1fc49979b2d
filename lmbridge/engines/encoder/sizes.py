"""How large a model will be, told from its files before it is loaded.

Rule: any worker thread; nothing is fetched and no weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmbridge.engines.transformers.options import ModelOptions

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def weight_bytes(options: ModelOptions) -> int | None:
    """Bytes of the weights in the dtype in which they will be loaded; None where there are no files of them here."""
    folder = _folder(options)
    if folder is None:
        return None
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    sizes = sizes or [path.stat().st_size for path in folder.glob("pytorch_model*.bin")]
    if not sizes:
        return None
    stored = _stored(folder)
    return int(sum(sizes) * _loaded(options, stored) / stored)


def _folder(options: ModelOptions) -> Path | None:
    path = Path(options.model)
    if path.is_dir():
        return path
    if path.exists():  # a file of another kind
        return None
    import huggingface_hub

    try:
        config = huggingface_hub.try_to_load_from_cache(options.model, "config.json", revision=options.revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _stored(folder: Path) -> int:
    try:
        config: Any = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = {}
    return _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)


def _loaded(options: ModelOptions, stored: int) -> int:
    named = str(options.dtype).removeprefix("torch.")
    if options.dtype is not None:
        return _BYTES.get(named, stored)
    import torch

    on_cpu = options.device.startswith("cpu") if options.device else not torch.cuda.is_available()
    return 4 if on_cpu else stored
