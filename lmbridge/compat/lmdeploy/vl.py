"""LMDeploy's ``lmdeploy.vl``: what reads images and the like, for prompts to vision models.

Rule: LMDeploy's own functions, imported when one is asked for. Its engine alone takes images.
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
            f"{name} is LMDeploy's ({cause}); install it with: pip install 'lmbridge[lmdeploy]'. An image can also be "
            "given as its URL, or as PIL.Image.open opens it."
        ) from cause
