"""The llama.cpp engine, file by file as a prompt passes.

``engine`` takes the request and finds it a free slot, ``asking`` says in llama.cpp's words what was asked for and
``forms`` what form the answer must have; ``calls`` is inside of llama.cpp meanwhile, ``reading`` makes deltas of what
is heard, ``jobs`` vectors and scores. ``options`` and ``loading`` build llama.cpp's server, ``header`` looks into a
GGUF file, ``library`` knows which parts of xllamacpp all this relies on.

Rule: importing this package loads no xllamacpp; neither torch nor transformers is ever loaded.
"""

from __future__ import annotations

from lmbridge.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
