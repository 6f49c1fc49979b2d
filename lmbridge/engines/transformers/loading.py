"""Loads model and tokenizer by transformers' documented calls, or says what the folder holds instead.

Rule: ``load`` runs on the engine's worker thread and blocks; ``with_defaults`` is quick and may run on any. Errors
visible in a model's configuration are raised before its weights are read.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from lmbridge.engines.transformers.hub import only_from_cache
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.errors import (
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    MissingDependencyError,
    ModelNotFoundError,
)
from lmbridge.messages import GenerationConfig

logger = logging.getLogger("lmbridge.loading")

_NO_ADVICE = {"temperature": (1, 0), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,)}
"""Fields for which a model's author may recommend a value, and the values that say nothing about how to sample."""
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_INSTEAD = "Give a causal language model, one whose config.json names a …ForCausalLM."
_ENCODER = " For its vectors, or its scores of pairs of texts, give engine='encoder'."


_reading = threading.Lock()
"""transformers sets process-wide state while loading: two loads at once lose each other's tied weights."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: in eval mode, on its device; its own generation settings are neutral.
        tokenizer: its tokenizer.
        eos: the token ids that end an answer.
        defaults: GenerationConfig field to the value that the model's author recommends for sampling.
        attention: the name of the attention it was loaded with; None where it has no choice of one.
    """

    model: Any
    tokenizer: Any
    eos: frozenset[int]
    defaults: dict[str, Any]
    attention: str | None


def load(options: ModelOptions) -> Loaded:
    """Load model and tokenizer.

    Raises:
        ModelNotFoundError: the hub has no such model or is unreachable, or there are no weights.
        EngineStartError: it is not a causal language model, is incomplete or broken, or has no tokenizer.
        MissingDependencyError: a package that it needs is not installed.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _reading, _progress_bar_on_terminals_only():
        source = _Source.of(options)
        config = _load_config(source)
        _refuse_unless_causal(config, source)
        tokenizer = _load_tokenizer(source)
        model, attention = _load_model(source, config, options, device)
    if options.attn_implementation is None and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        attention = "eager"  # sdpa knows no soft cap
        model.set_attn_implementation(attention)
    eos = _eos_ids(model, tokenizer)
    defaults = _recommended(model.generation_config) if options.generation_defaults == "model" else {}
    # `generate` fills gaps in a request's settings from the model's; whatever is asked for comes from the request.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return Loaded(model.to(device).eval(), tokenizer, eos, defaults, attention)


def with_defaults(config: GenerationConfig, defaults: dict[str, Any]) -> GenerationConfig:
    """A copy of ``config`` with ``defaults`` for unset fields, if it samples; a greedy one stays as it is."""
    if not config.samples:
        return config
    missing: Any = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return config.merged(missing) if missing else config


def free_memory() -> None:
    """Give memory of dropped tensors back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------- where it is from


@dataclass(frozen=True)
class _Source:
    """Where files are read from: a folder or a hub id, with options for ``from_pretrained``."""

    name: str
    label: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, options: ModelOptions) -> _Source:
        revision = options.revision or "main"
        arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "revision": revision}
        path = Path(options.model)
        if path.is_file():
            _need_gguf_packages(path)
            return cls(str(path.parent), str(path), {**arguments, "gguf_file": path.name})
        if not path.exists():
            arguments["local_files_only"] = only_from_cache(options.model, revision)
        return cls(options.model, options.model, arguments)

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.arguments

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    @property
    def folder(self) -> Path | None:
        """The folder, unless the model is on the hub or all in one file."""
        return Path(self.name) if self.is_local and not self.is_gguf else None


def _need_gguf_packages(path: Path) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"{path} is a GGUF file; transformers reads those with packages that are missing: {', '.join(missing)}. "
            'Install them with: pip install "lmbridge[gguf]"'
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise EngineStartError(f"{path} is not a GGUF file, judging by its first bytes; download it again.")


def _load_config(source: _Source) -> Any:
    advice = (
        "" if source.is_local else "; if it is an adapter (LoRA), merge it into its base model, and give that folder"
    )
    with _explained(source, "its configuration cannot be read", advice):
        try:
            return transformers.AutoConfig.from_pretrained(source.name, **source.arguments)
        except ValueError as cause:
            if "does not recognize this architecture" in str(cause):  # four lines of text that do not fit here
                raise EngineStartError(
                    f"{source.label} is of a model type unknown to transformers {transformers.__version__} "
                    f"({_first_line(cause).partition('. ')[0]}); a newer lmbridge may allow a newer transformers."
                ) from cause
            raise


def _load_tokenizer(source: _Source) -> Any:
    with _explained(source, "its tokenizer cannot be read"):
        _need_sentencepiece(source)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.name, **source.arguments)
        except Exception as cause:
            if source.folder and not any((source.folder / name).exists() for name in _TOKENIZER_FILES):
                raise _no_tokenizer(source) from cause
            raise
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise _no_tokenizer(source)
    return tokenizer


def _no_tokenizer(source: _Source) -> EngineStartError:
    return EngineStartError(
        f"{source.label} holds no tokenizer (such as tokenizer.json). Save the one that the model was trained with "
        f"beside it: AutoTokenizer.from_pretrained(BASE).save_pretrained({source.name!r})"
    )


def _need_sentencepiece(source: _Source) -> None:
    folder = source.folder
    if folder is None or (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return
    if importlib.util.find_spec("sentencepiece") is None:
        raise MissingDependencyError(
            f"The tokenizer of {source.label} (tokenizer.model) needs the package sentencepiece; "
            "install it with: pip install sentencepiece"
        )


def _load_model(source: _Source, config: Any, options: ModelOptions, device: str) -> tuple[Any, str | None]:
    """The model, and the attention it runs with: the fastest it has, unless the options name one."""
    wanted = options.attn_implementation
    with _explained(source, "its weights cannot be read"):
        for attention in (wanted,) if wanted else ("sdpa", "eager", None):
            try:
                model, report = transformers.AutoModelForCausalLM.from_pretrained(
                    source.name,
                    config=config,
                    dtype=_dtype(options.dtype, device),
                    output_loading_info=True,
                    **({} if attention is None else {"attn_implementation": attention}),
                    **source.arguments,
                )
                break
            except ValueError:  # the model does not know that attention; no weights have been read
                if attention == wanted:
                    raise
    _refuse_incomplete(model, set(report["missing_keys"]), source)
    return model, attention


def _refuse_incomplete(model: Any, missing: set[str], source: _Source) -> None:
    """Raise EngineStartError if weights were made up at random because the files lack them."""
    made_up = sorted(name for name, _ in model.named_parameters() if name in missing)
    if made_up:
        raise EngineStartError(
            f"The files of {source.label} lack {len(made_up)} of the weights of a {type(model).__name__}, such as "
            f"{made_up[0]}, so it would generate noise. They may be for another task, or incomplete; give the "
            "complete model's folder."
        )


# ------------------------------------------------------------------------------------------------------- what it is


def _refuse_unless_causal(config: Any, source: _Source) -> None:
    """Raise EngineStartError unless the model writes one token after another."""
    classes = list(getattr(config, "architectures", None) or ())
    what = f"{source.label} is a {config.model_type} model" + (f" ({', '.join(classes)})" if classes else "")
    if getattr(config, "is_encoder_decoder", False):
        raise EngineStartError(f"{what}, an encoder-decoder, which this engine does not support. {_INSTEAD}")
    if _has_own_code(config) and source.arguments["trust_remote_code"]:
        return
    if not _is_listed("MODEL_FOR_CAUSAL_LM_MAPPING", config, otherwise=True):
        raise EngineStartError(
            f"{what}, for which transformers has no causal language model. {_INSTEAD}{_as_encoder(config)}"
        )
    if _reads_both_ways(config):
        raise EngineStartError(f"{what}, an encoder, which does not generate text. {_INSTEAD}{_as_encoder(config)}")
    if classes and classes[0].endswith(_OTHER_HEADS):
        raise EngineStartError(f"{what}, which does not generate text. {_INSTEAD}{_as_encoder(config)}")


def _as_encoder(config: Any) -> str:
    """Advice to use the model for vectors or scores instead."""
    classes = list(getattr(config, "architectures", None) or ())
    if classes and classes[0].endswith(_OTHER_HEADS):
        return _ENCODER if classes[0].endswith("ForSequenceClassification") else ""
    reads = _is_listed("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", config, otherwise=False)
    return _ENCODER if reads and not getattr(config, "is_encoder_decoder", False) else ""


def _has_own_code(config: Any) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _reads_both_ways(config: Any) -> bool:
    """Whether each token sees those after it. BERT and its like do unless they are set up as decoders."""
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", None) is False:
        return True
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return not decodes and _is_listed("MODEL_FOR_MASKED_LM_MAPPING", config, otherwise=False)


def _is_listed(mapping: str, config: Any, otherwise: bool) -> bool:
    """Whether transformers lists the model for a task. It exports these lists and does not document them."""
    listed: Any = getattr(transformers, mapping, None)
    return otherwise if listed is None else type(config) in listed


# ------------------------------------------------------------------------------------------------- what it recommends


def _recommended(settings: Any) -> dict[str, Any]:
    """What the model's author states for sampling. transformers leaves a field None where generation_config.json, or
    an older model's config.json, states nothing.
    """
    found: dict[str, Any] = {}
    for name, no_advice in _NO_ADVICE.items():
        value = getattr(settings, name, None)
        if value is None or value in no_advice:
            continue
        try:
            given: Any = {name: value}
            GenerationConfig().merged(given)
        except InvalidRequestError as error:
            logger.warning("ignoring a recommendation in the model's generation_config.json: %s", error)
        else:
            found[name] = value
    return found


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The model's own end tokens, which may be one or several, and the tokenizer's."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(token for token in found if token >= 0)


# -------------------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def _explained(source: _Source, what: str, advice: str = "") -> Iterator[None]:
    """Turn errors of transformers, often a page long, into one sentence that names the cause."""
    try:
        yield
    except (LMBridgeError, MemoryError):
        raise
    except ImportError as cause:
        raise MissingDependencyError(f"{source.label} needs a package that is missing: {_first_line(cause)}") from cause
    except Exception as cause:
        if isinstance(cause, RuntimeError) and not source.is_gguf:  # torch: no memory, no such device
            raise
        raise _start_error(source, f"{source.label}: {what} ({_first_line(cause)}){advice}", cause) from cause


def _start_error(source: _Source, problem: str, cause: Exception) -> LMBridgeError:
    if "trust_remote_code" in str(cause):
        return EngineStartError(
            f"{source.label} comes with its own code; read it, and if you trust it, give trust_remote_code=True."
        )
    if source.is_gguf:
        return EngineStartError(f"{problem}; the file may be truncated, or of a kind unknown to transformers.")
    if source.is_local or not isinstance(cause, OSError):
        return EngineStartError(f"{problem}.")
    if source.arguments.get("local_files_only"):
        return ModelNotFoundError(f"{problem}; the hub is unreachable, and the cache does not hold the complete model.")
    return ModelNotFoundError(f"{problem}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".:")


def _dtype(wanted: Any, device: str) -> Any:
    if wanted is None:
        return torch.float32 if device.startswith("cpu") else "auto"
    return getattr(torch, wanted) if isinstance(wanted, str) and wanted != "auto" else wanted


@contextlib.contextmanager
def _progress_bar_on_terminals_only() -> Iterator[None]:
    """Bars in a log file are clutter. The setting is the process's, hence restored."""
    hide = transformers_logging.is_progress_bar_enabled() and not (sys.stderr and sys.stderr.isatty())
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
