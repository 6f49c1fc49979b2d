"""The transformers engine, file by file as a prompt passes.

``engine`` takes the request, ``encoding`` makes tokens of it, ``continuous`` has the model generate, ``attention`` and
``sampling`` are the parts of a step that are ours, ``running`` keeps what is known of one answer.

Rule: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from lmbridge.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
