"""The options of an engine that loads a Hugging Face model, validated when the engine is created.

Rule: standard library only; loads nothing. None leaves the choice to the loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmbridge.errors import InvalidRequestError

_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_LEAST = {"max_batch_size": 1, "max_chunk_size": 1, "max_context": 2, "page_size": 4, "num_blocks": 1, "threads": 1}
_CHOICES = {"runner": ("auto", "paged", "plain"), "generation_defaults": ("model", "none")}
_STRINGS = ("device", "attn_implementation", "revision")
_SWITCHES = ("trust_remote_code", "self_check", "cuda_graphs")


@dataclass(frozen=True)
class ModelOptions:
    """An engine's options; the engine class documents each.

    Raises:
        InvalidRequestError: a value is invalid; ``param`` names the option.
    """

    model: str
    device: str | None = None
    dtype: Any = None
    attn_implementation: str | None = None
    max_batch_size: int = 64
    max_chunk_size: int | None = None
    max_context: int | None = None
    cache_share: float | None = None
    page_size: int | None = None
    num_blocks: int | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    runner: str = "auto"
    self_check: bool = True
    generation_defaults: str = "model"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name != "max_batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _wrong(name, f"an int >= {least}", value)
        if self.cache_share is not None and not (isinstance(self.cache_share, float) and 0 < self.cache_share < 1):
            raise _wrong("cache_share", "a number between 0 and 1", self.cache_share)
        if self.dtype is not None and not _is_dtype(self.dtype):
            raise _wrong("dtype", f"one of {', '.join(_DTYPES)} or a torch dtype", self.dtype)
        for name in _STRINGS:
            if not isinstance(getattr(self, name), (str, type(None))):
                raise _wrong(name, "a string", getattr(self, name))
        self._check_choices()

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(name, " or ".join(repr(choice) for choice in choices), getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))


def _is_dtype(value: object) -> bool:
    return value in _DTYPES or str(value) in {f"torch.{name}" for name in _DTYPES}


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {value!r}.", param=name)
