"""The engine for models on other servers with OpenAI's API. The path of a prompt:

``engine`` takes the request, ``flavours`` knows what each kind of server supports, ``asking`` translates the request.
An ``errand`` takes it to a ``server`` of the ``group``, and to another if that one is away. ``reading`` turns the
stream into deltas, ``errors`` their errors into ours. ``jobs`` batches texts to embed or rerank. ``options`` are
validated when the engine is created; ``library`` loads the ``openai`` client.

Rule: importing this package does not load the ``openai`` library.
"""

from __future__ import annotations

from lmbridge.engines.openai.engine import OpenAIEngine

__all__ = ["OpenAIEngine"]
