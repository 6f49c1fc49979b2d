"""The memory of a device, and readable sizes.

Rule: any thread. torch is queried by its documented calls and only about CUDA, which that may initialise in this
process; so only call this when about to load a model, on a thread that may block.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.log import shown
from lmbridge.values import as_int, as_number

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_KINDS = (
    "cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia", "xla", "meta", "hip", "vulkan", "ipu", "ve", "fpga", "maia",
    "lazy", "mkldnn", "opengl", "opencl", "ideep", "mlu", "musa", "privateuseone",
    "ascend", "camb", "maca",
)  # fmt: skip
"""torch's device types and extensions' (without importing torch), then LMDeploy's names."""
_NAME = re.compile(rf"({'|'.join(_KINDS)})(?::(0|[1-9]\d*))?", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?|(\d+(?:\.\d+)?)\s*%", re.IGNORECASE)


class Limit:
    """How much of a device's memory models may use, as requested.

    Args:
        memory: bytes, ``"8GB"``, ``"8GiB"``, ``"80%"`` of the device's memory; None: all of it on CUDA, else no limit.

    Raises:
        InvalidRequestError: it is invalid.
    """

    def __init__(self, memory: int | str | None) -> None:
        self._bytes: int | None = None
        self._share: float | None = None
        if isinstance(memory, str):
            self._read(memory)
        elif memory is not None:
            self._bytes = as_int(memory)
        if memory is not None and not ((self._bytes or 0) > 0 or self._share):
            raise InvalidRequestError(
                f"memory must be bytes, or a size such as '8GB', '8GiB' or '80%', not {shown(memory)}.", "memory"
            )

    @property
    def given(self) -> bool:
        """Whether it is a number of bytes, so the device need not be queried."""
        return self._bytes is not None

    def of(self, device: str) -> int | None:
        """Bytes of this device that models may use; None: unlimited. May take seconds the first time."""
        if self._bytes is not None:
            return self._bytes
        whole = total_memory(device)
        if self._share is None:
            return whole if device.startswith("cuda") else None
        return None if whole is None else int(whole * self._share)

    def _read(self, text: str) -> None:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            return
        if match[3] is not None:
            share = float(match[3]) / 100
            self._share = share if 0 < share <= 1 else None
        else:
            self._bytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def total_memory(device: str) -> int | None:
    """The device's memory in bytes; None if unknown."""
    if device.startswith("cuda"):
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def usual_device() -> str:
    """The default device of torch engines: the first GPU, else the CPU. Imports torch."""
    torch: Any = importlib.import_module("torch")
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_name(name: object) -> str:
    """The canonical ``name``: ``cuda`` is ``cuda:0``, and there is one CPU.

    Raises:
        InvalidRequestError: it is not a torch device name.
    """
    named = _NAME.fullmatch(name) if isinstance(name, str) else None
    if named is None:
        hint = " NVIDIA's and AMD's GPUs are 'cuda', Apple's 'mps', Intel's 'xpu'." if isinstance(name, str) else ""
        raise InvalidRequestError(
            f"device must be a torch device name such as 'cpu' or 'cuda:0', not {shown(name)}.{hint}", "device"
        )
    return "cpu" if named[1] == "cpu" else f"{named[1]}:{named[2] or 0}"


def as_size(value: object) -> int | None:
    """An engine's reported memory in bytes; None if the value is invalid."""
    size = as_number(value)
    return int(size) if size is not None and 0 <= size < sys.maxsize else None


def in_words(size: int) -> str:
    """``3.1 GB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
