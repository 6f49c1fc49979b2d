"""The ExLlama engines' options, validated when an engine is created.

Rule: standard library only; loads nothing. None leaves the choice to the model or to ExLlama.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lmbridge.errors import InvalidRequestError

PAGE = 256
"""Tokens in a page of ExLlama's cache."""
_LEAST = {"max_batch_size": 1, "max_chunk_size": PAGE, "max_context": 2, "cache_tokens": PAGE, "tp": 1}


@dataclass(frozen=True)
class ExLlamaOptions:
    """An engine's options; the engine class documents each.

    Raises:
        InvalidRequestError: a value is invalid, or two contradict each other; ``param`` names the option.
    """

    model: str
    cache_widths: Sequence[int]
    device: str | None = None
    gpu_split: Sequence[float] | None = None
    tp: int = 1
    max_batch_size: int = 32
    max_chunk_size: int = 2048
    max_context: int | None = None
    cache_tokens: int | None = None
    cache_bits: int = 16
    revision: str | None = None

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if (value is not None or name not in optional) and not (_is_int(value) and value >= least):
                raise _wrong(name, f"an int >= {least}", value)
        for name in ("max_chunk_size", "cache_tokens"):
            if (getattr(self, name) or 0) % PAGE:
                raise _wrong(name, f"a multiple of {PAGE}", getattr(self, name))
        if self.cache_bits not in self.cache_widths or not _is_int(self.cache_bits):
            raise _wrong("cache_bits", f"one of {', '.join(map(str, self.cache_widths))}", self.cache_bits)
        if self.revision is not None and not isinstance(self.revision, str):
            raise _wrong("revision", "a string", self.revision)
        self._check_devices()

    def _check_devices(self) -> None:
        if self.device is not None and not re.fullmatch(r"cuda(:\d+)?", str(self.device)):
            raise _wrong("device", "'cuda' or 'cuda:1' and the like; ExLlama needs an NVIDIA or AMD GPU", self.device)
        if self.gpu_split is not None and not _is_split(self.gpu_split):
            raise _wrong("gpu_split", "a list of gigabytes for each GPU, such as [20, 24]", self.gpu_split)
        if self.device is not None and (self.gpu_split is not None or self.tp > 1):
            raise InvalidRequestError("device names one GPU, gpu_split or tp several: give only one.", param="device")

    def share(self) -> list[float] | None:
        """Gigabytes for the weights on each GPU, if specified."""
        if self.gpu_split is not None:
            return [float(part) for part in self.gpu_split]
        if self.device is not None and ":" in self.device:
            return [0.0] * int(self.device.partition(":")[2]) + [1e6]
        return None


def whole_pages(tokens: int) -> int:
    """``tokens``, rounded up to whole pages."""
    return -(-tokens // PAGE) * PAGE


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_split(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and all(isinstance(part, float) or _is_int(part) for part in value)
    return numbers and all(part >= 0 for part in value) and any(value)


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {value!r}.", param=name)
