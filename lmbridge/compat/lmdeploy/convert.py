"""Converts LMDeploy's engine configs to the chosen engine's options.

Rule: pure functions on the caller's thread. Configs are read by field name, so LMDeploy's own objects work like ours.
Unsupported settings are refused by name; settings without effect are ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import Any

from lmbridge.errors import InvalidRequestError, UnsupportedOptionError

_TRANSFORMERS = {
    "dtype": "dtype",
    "session_len": "max_context",
    "max_batch_size": "max_batch_size",
    "cache_max_entry_count": "cache_share",
    "block_size": "page_size",
    "cache_block_seq_len": "page_size",
    "num_gpu_blocks": "num_blocks",
    "max_prefill_token_num": "max_chunk_size",
    "revision": "revision",
}
"""Maps engine config fields to the transformers engine's options."""
_ALWAYS_SO = frozenset(
    {"thread_safe", "enable_metrics", "eager_mode", "enable_prefix_caching", "kernel_block_size", "language_model_only"}
)
"""What the transformers engine does anyway, or cannot be affected by."""


def common_options(config: Any) -> dict[str, Any]:
    """An engine config as options for engines other than LMDeploy's; fields at their defaults are left out.

    Raises:
        UnsupportedOptionError: fields are set that only LMDeploy has; the message names them all.
    """
    if config is None:
        return {}
    _check_engine_config(config)
    changed = changed_fields(config)
    where = f"{type(config).__name__} on an engine other than LMDeploy's"
    _refuse([name for name in changed if name not in _TRANSFORMERS and name not in _ALWAYS_SO], where)
    options = {_TRANSFORMERS[name]: value for name, value in changed.items() if name in _TRANSFORMERS}
    if isinstance(options.get("cache_share"), int):  # for TurboMind, an int counts blocks
        options["num_blocks"] = options.pop("cache_share")
    return options


def lmdeploy_engine_config(config: Any, library: Any) -> Any:
    """LMDeploy's own engine config, for one of ours or a copy of one of its own.

    ``thread_safe`` is removed because with it LMDeploy ends the process, and so are its metrics, which fill a queue
    that only its own server empties. Log-probabilities are enabled per request.

    Raises:
        UnsupportedOptionError: the installed LMDeploy does not have a field that is set.
    """
    _check_engine_config(config)
    own = copy.copy(config) if _is_lmdeploys(config) else _rebuilt(config, getattr(library, type(config).__name__))
    for name, value in (("thread_safe", False), ("enable_metrics", False)):
        if hasattr(own, name):
            setattr(own, name, value)
    if getattr(own, "logprobs_mode", "") is None:
        own.logprobs_mode = "raw_logprobs"
    return own


def lmdeploy_chat_template(config: Any, library: Any) -> Any:
    """LMDeploy's own ChatTemplateConfig, for one of ours or one of its own."""
    if config is None or _is_lmdeploys(config):
        return config
    if type(config).__name__ != "ChatTemplateConfig":
        raise InvalidRequestError(
            f"chat_template_config must be a ChatTemplateConfig, not {type(config).__name__}.", "chat_template_config"
        )
    return _rebuilt(config, library.ChatTemplateConfig)


def _rebuilt(config: Any, theirs: Any) -> Any:
    """An object of LMDeploy's class with the fields changed in ours."""
    known = {field.name: field for field in dataclasses.fields(theirs)}
    changed = {
        name: value for name, value in changed_fields(config).items() if name not in ("thread_safe", "enable_metrics")
    }
    _refuse([name for name in changed if name not in known], f"{theirs.__name__} of the installed LMDeploy")
    return theirs(**{name: _their_value(value, known[name].default) for name, value in changed.items()})


def _their_value(value: Any, default: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum) and isinstance(default, enum.Enum):
        return type(default)[value.name]
    return value


def _check_engine_config(config: Any) -> None:
    if type(config).__name__ not in ("PytorchEngineConfig", "TurbomindEngineConfig") or not has_fields(config, ("tp",)):
        raise InvalidRequestError(
            f"backend_config must be a PytorchEngineConfig or a TurbomindEngineConfig, not {type(config).__name__}.",
            "backend_config",
        )


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, and those without a default."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    defaults["kernel_block_size"] = values.get("block_size")  # what -1 stands for
    return {name: value for name, value in values.items() if value != defaults[name]}


def _refuse(names: list[str], where: str) -> None:
    if names:
        raise UnsupportedOptionError(f"{where} does not support {', '.join(names)}; leave it out.", param=names[0])


def has_fields(config: Any, names: Any) -> bool:
    return dataclasses.is_dataclass(config) and set(names) <= {field.name for field in dataclasses.fields(config)}


def _is_lmdeploys(config: object) -> bool:
    return type(config).__module__.partition(".")[0] == "lmdeploy"
