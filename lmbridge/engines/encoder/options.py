"""The options of the encoder engine, validated when the engine is created.

Rule: standard library only; loads nothing. None leaves the choice to the loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.errors import InvalidRequestError
from lmbridge.log import shown
from lmbridge.values import as_int, as_number

LAYOUTS = ("packed", "grouped", "single")
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")
_RARE_DEVICES = (
    "ipu",
    "hip",
    "ve",
    "fpga",
    "maia",
    "vulkan",
    "privateuseone",
    "npu",
    "musa",
    "mlu",
)  # torch's and add-ons'
_CHOICES = {"task": ("auto", "embed", "rerank"), "layout": ("auto", *LAYOUTS), "pooling": (None, *POOLINGS)}


@dataclass(frozen=True)
class EncoderOptions:
    """The engine's options; EncoderEngine documents each.

    Attributes:
        model: how the model is loaded.

    Raises:
        InvalidRequestError: a value is invalid; ``param`` names the option.
    """

    model: ModelOptions
    task: str = "auto"
    pooling: str | None = None
    max_length: int | None = None
    max_batch_tokens: int | None = None
    batch_timeout: float = 0.0
    layout: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(name, " or ".join(repr(choice) for choice in choices), getattr(self, name))
        for name in ("max_length", "max_batch_tokens"):
            value = getattr(self, name)
            number = as_int(value)
            if value is not None and (number is None or number < 1):
                raise _wrong(name, "an int >= 1", value)
        if not _is_device(self.model.device):
            raise _wrong(
                "device", f"a torch device ({', '.join(_DEVICES)}), or one such as 'cuda:1'", self.model.device
            )
        seconds = as_number(self.batch_timeout)
        if seconds is None or not 0 <= seconds < float("inf"):
            raise _wrong("batch_timeout", "seconds >= 0", self.batch_timeout)


def _is_device(name: str | None) -> bool:
    """Whether it is a torch device name, without importing torch."""
    kind, colon, number = (name or "cpu").partition(":")
    return kind in (*_DEVICES, *_RARE_DEVICES) and (not colon or number.isdecimal())


def _wrong(name: str, expected: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {shown(value)}.", param=name)
