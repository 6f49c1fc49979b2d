"""Writes rankings and errors in each dialect.

Rule: plain data in, JSON objects out; sends nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from lmbridge import Ranked
from lmbridge.flask.errors import HttpError
from lmbridge.flask.rerank.reading import RerankCall

Write = Callable[[RerankCall, Sequence[Ranked], str, int], Any]
"""Makes JSON from a call, its ranking, the model's name and the number of prompt tokens."""


def cohere_writer(version: str) -> Write:
    """A writer for Cohere's clients of this API version, and for Jina's, vLLM's and infinity's clients."""

    def write(call: RerankCall, ranking: Sequence[Ranked], model: str, tokens: int) -> dict[str, Any]:
        return {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": model,
            "results": [_result(call, ranked) for ranked in ranking],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": {"api_version": {"version": version}, "tokens": {"input_tokens": tokens, "output_tokens": 0}},
        }

    return write


def _result(call: RerankCall, ranked: Ranked) -> dict[str, Any]:
    result: dict[str, Any] = {"index": ranked.index, "relevance_score": ranked.score}
    if call.with_documents:
        given = call.documents[ranked.index]
        result["document"] = given if isinstance(given, dict) else {"text": given}
    return result


def write_tei(call: RerankCall, ranking: Sequence[Ranked], model: str, tokens: int) -> Any:
    """Write for text-embeddings-inference's clients; as for Cohere's if the request had ``documents``."""
    if call.field == "documents":
        return cohere_writer("1")(call, ranking, model, tokens)
    results = []
    for ranked in ranking:
        text = {"text": call.documents[ranked.index]} if call.with_documents else {}
        results.append({"index": ranked.index, "score": ranked.score, **text})
    return results


# --- errors ---


def cohere_error(error: HttpError) -> dict[str, Any]:
    """Write an error for Cohere's clients, which read ``message``; the rest is as on the OpenAI-compatible routes."""
    facts = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"message": error.message, "error": facts}


_TEI_TYPES = {429: "overloaded", 503: "unhealthy"}


def tei_error(error: HttpError) -> dict[str, Any]:
    """Write an error for TEI's clients: ``error`` and ``error_type`` are strings; ``param`` and ``code`` are ours."""
    kind = _TEI_TYPES.get(error.status, "validation" if error.status < 500 else "backend")
    return {"error": error.message, "error_type": kind, "param": error.param, "code": error.code}
