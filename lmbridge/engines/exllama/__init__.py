"""The ExLlama engines, V2 and V3. The path of a prompt:

``engine`` takes the request, ``generation`` drives ExLlama's generator on the thread that owns it, and ``guide``
constrains an answer to its grammar. ``v2`` and ``v3`` load the model according to ``options``, after ``library`` has
checked the package; ``model`` is what the two have in common.

Rule: importing this package loads neither torch nor ExLlama.
"""

from __future__ import annotations

from lmbridge.engines.exllama.engine import ExLlamaEngine
from lmbridge.engines.exllama.v2 import ExLlamaV2Engine
from lmbridge.engines.exllama.v3 import ExLlamaV3Engine

__all__ = ["ExLlamaEngine", "ExLlamaV2Engine", "ExLlamaV3Engine"]
