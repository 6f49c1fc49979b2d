"""The engine whose model is on other servers, which speak OpenAI's API, file by file as a prompt passes.

``engine`` takes the request, ``flavours`` knows what each kind of server takes, ``asking`` says the request in its
words. An ``errand`` takes it to a ``server`` of the ``group``, and on to another where that one is not there.
``reading`` makes deltas of what is streamed, ``errors`` our errors of theirs. ``jobs`` sends what is to be embedded or
reranked together. ``options`` are checked when the engine is made; ``library`` brings the ``openai`` client.

Rule: importing this package does not load the ``openai`` library.
"""

from __future__ import annotations

from lmbridge.engines.openai.engine import OpenAIEngine

__all__ = ["OpenAIEngine"]
