"""The vLLM engine. The path of a prompt:

``engine`` takes the request and drives vLLM's ``AsyncLLM`` on the server's loop, ``options`` and ``sampling`` translate
options and config, ``loading`` builds it, ``library`` checks the parts of vLLM that all this relies on.

Rule: importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

from lmbridge.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
