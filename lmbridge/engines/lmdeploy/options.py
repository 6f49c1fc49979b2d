"""The LMDeploy engine's options, validated when it is created, and the backend config they make.

Rule: LMDeploy is imported only inside functions. None leaves the choice to LMDeploy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmbridge.errors import InvalidRequestError

BACKENDS = ("pytorch", "turbomind")
_DTYPES = ("auto", "float16", "bfloat16")
_LEAST = {"max_batch_size": 1, "max_chunk_size": 1, "max_context": 2, "page_size": 1, "num_blocks": 16, "tp": 1}
_IN_BACKEND_CONFIG = ("backend", "device", "dtype", "cache_share", "revision", *_LEAST)
_NAMES = {
    "pytorch": {
        "device": "device_type",
        "dtype": "dtype",
        "max_batch_size": "max_batch_size",
        "max_chunk_size": "max_prefill_token_num",
        "max_context": "session_len",
        "cache_share": "cache_max_entry_count",
        "page_size": "block_size",
        "num_blocks": "num_gpu_blocks",
        "tp": "tp",
        "revision": "revision",
    },
    "turbomind": {
        "dtype": "dtype",
        "max_batch_size": "max_batch_size",
        "max_chunk_size": "max_prefill_token_num",
        "max_context": "session_len",
        "cache_share": "cache_max_entry_count",
        "page_size": "cache_block_seq_len",
        "num_blocks": "cache_max_entry_count",  # an int there counts blocks
        "tp": "tp",
        "revision": "revision",
    },
}
"""Maps our options to the fields of each backend's config."""


@dataclass(frozen=True)
class LMDeployOptions:
    """An engine's options; the engine class documents each.

    Raises:
        InvalidRequestError: a value is invalid, or two contradict each other; ``param`` names the option.
    """

    model: str
    backend: str | None = None
    backend_config: Any = None
    device: str | None = None
    dtype: Any = None
    max_batch_size: int | None = None
    max_chunk_size: int | None = None
    max_context: int | None = None
    cache_share: float | None = None
    page_size: int | None = None
    num_blocks: int | None = None
    tp: int | None = None
    revision: str | None = None
    chat_template_config: Any = None
    trust_remote_code: bool = False
    log_level: str = "WARNING"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise _wrong(name, f"an int >= {least}", value)
        if self.cache_share is not None and not (isinstance(self.cache_share, float) and 0 < self.cache_share < 1):
            raise _wrong("cache_share", "a number between 0 and 1", self.cache_share)
        if self.backend not in (None, *BACKENDS):
            raise _wrong("backend", "'pytorch', 'turbomind' or None", self.backend)
        if self.dtype is not None and _dtype_name(self.dtype) not in _DTYPES:
            raise _wrong("dtype", f"one of {', '.join(_DTYPES)} or a torch dtype", self.dtype)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.backend_config is not None:
            for name in _IN_BACKEND_CONFIG:
                if getattr(self, name) is not None:
                    raise InvalidRequestError(f"backend_config is given; set {name} in it instead.", param=name)
        if self.backend == "turbomind" and self.device not in (None, "cuda"):
            raise _wrong("device", "'cuda' with turbomind", self.device)
        if self.backend == "turbomind" and None not in (self.cache_share, self.num_blocks):
            raise InvalidRequestError("turbomind takes cache_share or num_blocks, not both.", param="num_blocks")

    @property
    def tells_logprobs(self) -> bool:
        """Whether the engine can return log-probabilities; the PyTorch engine can in one mode only."""
        mode = getattr(self.backend_config, "logprobs_mode", "raw_logprobs")
        return bool(mode == "raw_logprobs")

    def given(self) -> dict[str, Any]:
        """The given options that belong in a backend's config."""
        values = {name: getattr(self, name) for name in _IN_BACKEND_CONFIG if name != "backend"}
        if self.dtype is not None:
            values["dtype"] = _dtype_name(self.dtype)
        return {name: value for name, value in values.items() if value is not None}


def build_config(options: LMDeployOptions, path: str) -> tuple[str, Any]:
    """The backend that loads the model at ``path``, and its config. On the worker thread: it reads the model's config.

    Raises:
        InvalidRequestError: the chosen backend has no such option.
    """
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
    from lmdeploy.archs import autoget_backend, autoget_backend_config

    if options.backend_config is not None:
        found: tuple[str, Any] = autoget_backend_config(
            path, options.backend_config, trust_remote_code=options.trust_remote_code
        )
        return found
    backend = options.backend or autoget_backend(path, trust_remote_code=options.trust_remote_code)
    fields: dict[str, Any] = {"enable_metrics": False}  # metrics fill a queue that only LMDeploy's own server empties
    if backend == "pytorch":
        fields["logprobs_mode"] = "raw_logprobs"  # needed for logprobs; free until requested
    for name, value in options.given().items():
        if name == "device" and backend == "turbomind":
            if value != "cuda":
                raise _wrong("device", "'cuda' with turbomind", value)
            continue
        fields[_NAMES[backend][name]] = value
    return backend, (PytorchEngineConfig if backend == "pytorch" else TurbomindEngineConfig)(**fields)


def _dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {value!r}.", param=name)
