"""The blueprint and its views.

Rule: HTTP only; ``reading`` reads bodies and ``writing`` writes responses. Each document is a separate request to the
bridge, so that the documents of many clients share batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, request

from lmbridge.caller.shapes import ranking
from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.asking import Asked, put_in_clients_words
from lmbridge.flask.openai.errors import describe
from lmbridge.flask.rerank.reading import RerankCall, read_cohere, read_tei
from lmbridge.flask.rerank.writing import Write, cohere_error, cohere_writer, tei_error, write_tei

blueprint = Blueprint("lmbridge_rerank", __name__)
blueprint.before_request(guard.begin)
blueprint.after_request(guard.finish)


@blueprint.post("/v1/rerank", strict_slashes=False)
def rerank_v1() -> Response:
    return _answer(read_cohere, cohere_writer("1"))


@blueprint.post("/v2/rerank", strict_slashes=False)
def rerank_v2() -> Response:
    return _answer(read_cohere, cohere_writer("2"))


@blueprint.post("/rerank", strict_slashes=False)
def rerank_tei() -> Response:
    return _answer(read_tei, write_tei)


for _rule, _name in (("/v1/rerank", "v1"), ("/v2/rerank", "v2"), ("/rerank", "tei")):
    guard.refuse_other_methods(blueprint, _rule, f"not_rerank_{_name}", "POST")


def _answer(read: Callable[[dict[str, Any]], RerankCall], write: Write) -> Response:
    asked = Asked("rerank")
    call = read(asked.values)
    asked.log((call.query, call.documents))
    options: Any = {
        "truncate": call.truncate,
        "timeout": asked.timeout,
        "request_id": guard.unique_id(),
    }
    try:
        responses = asked.client.rerank(call.query, call.documents, details=True, **options)
    except LMBridgeError as error:
        at_query = isinstance(error, InvalidRequestError) and error.param == "query"
        if at_query:  # there is only one query, whichever document's request failed
            error.index = None
        put_in_clients_words(error, "query" if at_query else call.field, ("query",))
        raise
    tokens = sum(response.usage.prompt_tokens for response in responses)
    return _json(write(call, ranking(responses, call.documents, call.top_n), asked.model, tokens))


@blueprint.errorhandler(Exception)
def _refuse(error: Exception) -> Response:
    """The error response to a failed request, in its dialect."""
    told = describe(error)
    is_tei = str(request.endpoint).endswith("_tei")
    response = _json(tei_error(told) if is_tei else cohere_error(told))
    response.status_code = told.status
    response.headers.update(told.headers)
    return response


def _json(value: object) -> Response:
    return Response(json.dumps(value, allow_nan=False), mimetype="application/json")
