"""Vectors of texts and scores of documents, by llama.cpp.

Rule: runs on a slot's thread, which it blocks; nothing is shared.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from lmbridge.engines.llamacpp.loading import Model
from lmbridge.engines.llamacpp.reading import failure
from lmbridge.errors import EngineError, InvalidRequestError, PromptTooLongError
from lmbridge.messages import Delta, Embed, Job, Rerank, Usage

_CUTS = 8  # attempts to make a text fit
_MARGIN = 0.95  # of the length that would fit if tokens were spread evenly
_OWN_SCORES = ("qwen3",)  # architectures whose score llama.cpp turns into a probability


def done(job: Job, model: Model) -> Delta:
    """The job's result.

    Raises:
        LMBridgeError: it cannot be done.
    """
    if isinstance(job, Embed):
        return _embedded(job, model)
    assert isinstance(job, Rerank)
    return _ranked(job, model)


def _embedded(job: Embed, model: Model) -> Delta:
    import numpy

    text = f"{job.prompt}{job.text}" if job.prompt and isinstance(job.text, str) else job.text
    said = _fitted(
        text, job.truncate, lambda part: _said(model.server.handle_embeddings, input=part, embd_normalize=-1)
    )
    vector = numpy.asarray(said["data"][0]["embedding"], dtype=numpy.float32)[: job.dimensions]
    length = float(numpy.linalg.norm(vector))
    if job.normalize and length:
        vector /= length
    return Delta(finish_reason="stop", value=vector, usage=Usage(said["usage"]["prompt_tokens"]))


def _ranked(job: Rerank, model: Model) -> Delta:
    def ask(document: Any) -> Any:
        return _said(model.server.handle_rerank, query=job.query, documents=[document])

    said = _fitted(job.document, job.truncate, ask)
    score = float(said["results"][0]["relevance_score"])
    if not model.header.architecture.startswith(_OWN_SCORES):
        score = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
    return Delta(finish_reason="stop", value=score, usage=Usage(said["usage"]["prompt_tokens"]))


def _fitted(text: Any, truncate: str, ask: Any) -> Any:
    """The result of ``ask`` for the text or, with ``truncate``, for as much of its beginning as fits."""
    for _ in range(_CUTS):
        if not text:
            raise InvalidRequestError("The text is empty, or the query leaves no room for it.", "prompt")
        try:
            return ask(text)
        except PromptTooLongError as error:
            if truncate == "error":
                raise
            text = text[: _fitting(error, len(text))]
    raise EngineError("No part of the text fits into llama.cpp's context.")


def _fitting(error: PromptTooLongError, length: int) -> int:
    """How much of a text of this length may fit, by llama.cpp's token counts."""
    count = re.search(r"\((\d+) tokens\)", str(error))
    share = error.most / int(count[1]) if error.most and count else 0.5
    return int(length * min(share, 1.0) * _MARGIN)


def _said(handle: Any, **asked: Any) -> Any:
    try:
        body = json.dumps(asked, ensure_ascii=False)
        body.encode()  # unpaired surrogates are not text
        said = json.loads(handle(body))
    except (RuntimeError, ValueError, TypeError) as cause:
        raise InvalidRequestError(f"llama.cpp refused the text: {cause}", "prompt") from cause
    if "error" in said:
        raise failure(said["error"])
    return said
