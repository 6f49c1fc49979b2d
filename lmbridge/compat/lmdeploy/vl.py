"""LMDeploy's ``lmdeploy.vl``: loads images and other media for vision models.

Rule: LMDeploy's own functions, imported on first use. Only its engine takes images.
"""

from __future__ import annotations

import importlib
from typing import Any

from lmbridge.errors import MissingDependencyError

_NAMES = (
    "encode_audio_base64", "encode_image_base64", "encode_time_series_base64", "encode_video_base64", "load_audio",
    "load_image", "load_time_series", "load_video",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("lmdeploy.vl"), name)
    except ImportError as cause:
        raise MissingDependencyError(
            f"{name} needs LMDeploy ({cause}); install it with: pip install 'lmbridge[lmdeploy]'. Or give an image as "
            "its URL, or as PIL.Image.open returns it."
        ) from cause
