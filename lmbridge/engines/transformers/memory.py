"""Estimates a model's memory: weights from its files, cache from its configuration.

Rule: any worker thread; downloads nothing and reads no weights. torch and transformers are imported inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmbridge.engines.transformers.options import ModelOptions

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def needed(options: ModelOptions) -> int | None:
    """Bytes of the weights and the cache; None for a model not yet downloaded, or a single file.

    On a GPU the cache takes what is free unless it was told how much; one request's is counted then, which it needs.
    """
    weights = weight_bytes(options)
    if weights is None:
        return None
    return weights + (_cache(options) if options.runner != "plain" else 0)


def weight_bytes(options: ModelOptions) -> int | None:
    """Bytes of the weights in the dtype they will be loaded in; None if their files are not local."""
    folder = _folder(options)
    if folder is None:
        return None
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    sizes = sizes or [path.stat().st_size for path in folder.glob("pytorch_model*.bin")]
    if not sizes:
        return None
    stored = _itemsize(_stored(folder))
    return sum(sizes) * _itemsize(_loaded(options, folder)) // stored


def cached_per_token(config: Any, itemsize: int) -> int:
    """Bytes that a token of a request holds in the cache for as long as that runs."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size * itemsize)


def _cache(options: ModelOptions) -> int:
    """Bytes of the cache; 0 if its configuration needs the model's own code."""
    folder = _folder(options)
    assert folder is not None
    import torch
    import transformers

    from lmbridge.engines.transformers.runner import context_of
    from lmbridge.engines.transformers.sizes import UNKNOWN_CONTEXT, CacheSizes

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        dtype = getattr(torch, _loaded(options, folder))
        model = SimpleNamespace(config=config, dtype=dtype, device=torch.device("cpu" if _on_cpu(options) else "cuda"))
        per_token = cached_per_token(config.get_text_config(), dtype.itemsize)
        if _on_cpu(options) or options.num_blocks is not None or options.cache_share is not None:
            sizes = CacheSizes(model, options)
            return sizes.blocks * sizes.page * per_token
        return (context_of(model, options) or UNKNOWN_CONTEXT) * per_token
    except Exception:  # loading will report the error
        return 0


def _folder(options: ModelOptions) -> Path | None:
    path = Path(options.model)
    if path.is_dir():
        return path
    if path.exists():  # a file of another kind
        return None
    import huggingface_hub

    try:
        config = huggingface_hub.try_to_load_from_cache(options.model, "config.json", revision=options.revision)
    except ValueError:  # not a valid hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


def _stored(folder: Path) -> str:
    try:
        config: Any = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = {}
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _loaded(options: ModelOptions, folder: Path) -> str:
    """The torch name of the dtype that the model will have."""
    if options.dtype is not None and options.dtype != "auto":
        return str(options.dtype).removeprefix("torch.")
    return "float32" if options.dtype is None and _on_cpu(options) else _stored(folder)


def _itemsize(dtype: str) -> int:
    return _BYTES.get(dtype, 4)


def _on_cpu(options: ModelOptions) -> bool:
    if options.device:
        return options.device.startswith("cpu")
    import torch

    return not torch.cuda.is_available()
