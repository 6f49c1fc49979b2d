"""Loads model, tokenizer and the files of sentence-transformers, from a folder or the hub.

Rule: ``load`` runs on the engine's worker thread and blocks. Loading code for every kind of model comes from the
transformers engine's ``loading``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from lmbridge.engines.encoder.options import EncoderOptions
from lmbridge.engines.encoder.settings import MODULES, Read, Settings, read_settings
from lmbridge.engines.encoder.vectors import activation_of
from lmbridge.engines.transformers.loading import (
    _dtype,
    _explained,
    _load_config,
    _load_tokenizer,
    _progress_bar_on_terminals_only,
    _reading,
    _Source,
)
from lmbridge.engines.transformers.runner import NO_LIMIT
from lmbridge.errors import EngineStartError
from lmbridge.messages import Task

notes = logging.getLogger("lmbridge.loading")  # commands show these, too

_HEAD = "ForSequenceClassification"
_UNSTATED = 1_000_000_000
"""transformers gives tokenizers without a limit one above this."""


@dataclass(frozen=True)
class Parts:
    """A model that is ready to run.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: its tokenizer, a fast one.
        settings: its settings for sentence-transformers.
        task: its task.
        activation: turns a single logit into a score; None if unspecified.
    """

    model: Any
    tokenizer: Any
    settings: Settings
    task: Task
    activation: Callable[[torch.Tensor], Any] | None = None


def load(options: EncoderOptions) -> Parts:
    """Load the model.

    Raises:
        ModelNotFoundError: the hub has no such model or is unreachable, or there are no weights.
        EngineStartError: it is not an encoder, is incomplete or broken, or needs an unsupported feature.
        MissingDependencyError: a package that it needs is not installed.
    """
    device = options.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _reading, _progress_bar_on_terminals_only():
        source = _Source.of(options.model)
        config = _load_config(source)
        if getattr(config, "is_encoder_decoder", False):
            raise EngineStartError(f"{source.label} is an encoder-decoder, which this engine does not support.")
        task = task_of(config) if options.task == "auto" else options.task
        settings = read_settings(_reader(source))
        if task == "rerank" and settings.default_prompt:
            raise EngineStartError(f"{source.label} puts a prompt before each pair, which is not supported.")
        tokenizer = _load_tokenizer(source)
        model = _load_model(source, config, task, tokenizer, _dtype(options.model.dtype, device))
        activation = _activation(settings, config, source) if task == "rerank" else None
    found: Task = "rerank" if task == "rerank" else "embed"
    return Parts(model.to(device), tokenizer, settings, found, activation)


def task_of(config: Any) -> Task:
    """What a model of this configuration was trained for."""
    classes = getattr(config, "architectures", None) or ()
    return "rerank" if any(name.endswith(_HEAD) for name in classes) else "embed"


def _activation(settings: Settings, config: Any, source: _Source) -> Any:
    """The activation named in the files, wherever the releases of sentence-transformers put it."""
    older = getattr(config, "sentence_transformers", None) or {}
    oldest = getattr(config, "sbert_ce_default_activation_function", None)
    name = settings.activation or older.get("activation_fn") or oldest
    if name is None:
        return None
    found = activation_of(name)
    if found is None:
        raise EngineStartError(
            f"{source.label} uses the activation {name} for its scores, which is not supported. Load it as a "
            "CrossEncoder of sentence-transformers, and give that object as the model."
        )
    return found


def _prepared(model: Any) -> Any:
    """The model without unused parts."""
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    # Without its pooler such a model skips an unused computation.
    if "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None
    return model


def room_of(parts: Parts, wanted: int | None) -> int:
    """The most tokens of a text.

    Raises:
        EngineStartError: max_length exceeds the model's positions.
    """
    positions = _positions(parts.model)
    if wanted is not None:
        if wanted > positions:
            raise EngineStartError(f"max_length is {wanted}, but the model has positions for only {positions} tokens.")
        return wanted
    stated = parts.tokenizer.model_max_length
    limits = [parts.settings.max_length, stated if stated and stated < _UNSTATED else None, positions]
    return min(int(limit) for limit in limits if limit)


def counts_like_roberta(model: Any) -> bool:
    """Whether positions probably begin after the padding token's id."""
    return any(embedding.padding_idx is not None for embedding in _position_embeddings(model))


def table_of(model: Any) -> int | None:
    """The size of the model's table of positions; None for computed positions."""
    return min(
        (
            embedding.num_embeddings - (0 if embedding.padding_idx is None else embedding.padding_idx + 1)
            for embedding in _position_embeddings(model)
        ),
        default=None,
    )


def _positions(model: Any) -> int:
    """How many tokens the model has positions for."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [table_of(model), stated if isinstance(stated, int) and stated > 0 else None]
    return min((limit for limit in limits if limit is not None), default=NO_LIMIT)


def _position_embeddings(model: Any) -> list[torch.nn.Embedding]:
    return [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
    ]


def _load_model(source: _Source, config: Any, task: str, tokenizer: Any, dtype: Any) -> Any:
    auto = transformers.AutoModelForSequenceClassification if task == "rerank" else transformers.AutoModel
    with _explained(source, "its weights cannot be read"):
        model, report = auto.from_pretrained(
            source.name, config=config, dtype=dtype, output_loading_info=True, **source.arguments
        )
    model = _prepared(model)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:  # heads of decoders then refuse batches
        text.pad_token_id = tokenizer.pad_token_id
    made_up = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if made_up:
        raise EngineStartError(
            f"The files of {source.label} lack {len(made_up)} of the weights of a {type(model).__name__}, such as "
            f"{made_up[0]}, so its output would be noise. They may be for another task, or incomplete."
        )
    return model


def _reader(source: _Source) -> Read:
    """A function that finds the model's other files, in its folder or on the hub."""

    def in_folder(name: str) -> Path | None:
        path = Path(source.name) / name
        return path if path.is_file() else None

    def on_hub(name: str) -> Path | None:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    source.name,
                    name,
                    revision=source.arguments["revision"],
                    local_files_only=bool(source.arguments.get("local_files_only")),
                )
            )
        except LocalEntryNotFoundError:
            if name == MODULES:
                notes.warning("the hub is unreachable, so the pooling settings of %s are unknown", source.name)
            return None
        except EntryNotFoundError:
            return None

    return in_folder if source.is_local else on_hub
