"""The llama.cpp engine. The path of a prompt:

``engine`` takes the request and finds a free slot, ``asking`` translates it for llama.cpp and ``forms`` the form of the
answer; ``calls`` is inside llama.cpp meanwhile, ``reading`` turns its output into deltas, ``jobs`` into vectors and
scores. ``options`` and ``loading`` build llama.cpp's server, ``header`` reads a GGUF file's header, ``library`` checks
the parts of xllamacpp that all this relies on.

Rule: importing this package loads no xllamacpp; neither torch nor transformers is ever loaded.
"""

from __future__ import annotations

from lmbridge.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
