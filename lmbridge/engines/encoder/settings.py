"""The files of sentence-transformers: output modules, text length and prompts.

Rule: runs on the engine's worker thread, and only reads files, from a folder or the hub; sentence-transformers itself
is not needed. Its releases 5 and 6 have moved modules and renamed keys; both are supported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmbridge.engines.encoder.prompts import NO_PROMPTS
from lmbridge.errors import EngineStartError

Read = Callable[[str], "Path | None"]
"""Maps a file name to its local path; None if the model has no such file."""

_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODULES = "modules.json"
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class Module:
    """One module of sentence-transformers.

    Attributes:
        kind: the name of its class.
        config: what it was built with.
        weights: its tensors by name.
    """

    kind: str
    config: dict[str, Any]
    weights: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Settings:
    """A model's settings beyond those of transformers.

    Attributes:
        modules: the modules after the model; empty if unspecified.
        max_length: tokens, special ones included.
        lowercase: lowercase the texts.
        prompts: by name.
        default_prompt: the name of the prompt for texts without one.
        activation: the activation for scores; None if unspecified.
    """

    modules: Sequence[Module] = ()
    max_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=lambda: dict(NO_PROMPTS))
    default_prompt: str | None = None
    activation: str | None = None

    @property
    def pooling(self) -> tuple[str, ...]:
        """How a text's token vectors are pooled; results of several kinds are concatenated."""
        for module in self.modules:
            if module.kind == "Pooling":
                return pooling_of(module.config)
        return ()


def read_settings(read: Read) -> Settings:
    """Read the settings from the files.

    Raises:
        EngineStartError: they need an unsupported feature, or cannot be read.
    """
    listed = _json(read, MODULES) or []
    modules = [_module(read, entry) for entry in listed]
    own = _json(read, "sentence_bert_config.json") or {}
    general = _json(read, "config_sentence_transformers.json") or {}
    return Settings(
        checked_modules(modules),
        own.get("max_seq_length"),
        bool(own.get("do_lower_case", False)),
        {**NO_PROMPTS, **(general.get("prompts") or {})},
        general.get("default_prompt_name"),
        general.get("activation_fn"),
    )


def checked_modules(modules: Sequence[Module]) -> Sequence[Module]:
    """The modules after the model, if this engine supports them in this order.

    Raises:
        EngineStartError: it does not.
    """
    for module in modules:
        if module.kind not in _KINDS:
            raise EngineStartError(
                f"The model has a module {module.kind!r} of sentence-transformers, which is not supported. This engine "
                f"supports {', '.join(_KINDS)}. Load it with sentence-transformers, and give that object as the model."
            )
    order = [_KINDS.index(module.kind) for module in modules]
    if order != sorted(order) or order.count(0) > 1 or order.count(1) > 1:
        kinds = ", ".join(module.kind for module in modules)
        raise EngineStartError(
            f"The model's modules come in an unsupported order: {kinds}. Load it with "
            "sentence-transformers, and give that object as the model."
        )
    return [module for module in modules if module.kind != "Transformer"]


def pooling_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of pooling in a Pooling module's configuration, old or new.

    Raises:
        EngineStartError: pooling excludes the prompt.
    """
    if config.get("include_prompt") is False:
        raise EngineStartError(
            "The model's pooling excludes the prompt (include_prompt), which this engine does not support. Load it "
            "with sentence-transformers, and give that object as the model."
        )
    named = config.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(mode for key, mode in _LEGACY_POOLING.items() if config.get(key)) or ("mean",)


def _module(read: Read, entry: dict[str, Any]) -> Module:
    path, kind = entry.get("path", ""), str(entry.get("type", "")).rpartition(".")[2]
    if kind == "Transformer":
        if path:
            raise EngineStartError(f"The model itself is in the subfolder {path!r}; give that folder.")
        return Module(kind, {})
    return Module(kind, _json(read, f"{path}/config.json") or {}, lambda: _weights(read, path))


def _weights(read: Read, folder: str) -> dict[str, Any]:
    if (path := read(f"{folder}/model.safetensors")) is not None:
        from safetensors.torch import load_file

        return dict(load_file(path))
    if (path := read(f"{folder}/pytorch_model.bin")) is not None:
        import torch

        return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise EngineStartError(f"The model's module {folder} has no weights (model.safetensors); download the model again.")


def _json(read: Read, name: str) -> Any:
    path = read(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as cause:
        raise EngineStartError(f"{path} cannot be read ({cause}); download the model again.") from cause
