"""The vLLM engine, file by file as a prompt passes.

``engine`` takes the request and drives vLLM's ``AsyncLLM`` on the server's loop, ``options`` and ``sampling`` say in
vLLM's words what was asked for, ``loading`` builds it, ``library`` knows which parts of vLLM all this relies on.

Rule: importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

from lmbridge.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
