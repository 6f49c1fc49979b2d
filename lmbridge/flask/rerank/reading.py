"""Reads the JSON of a reranking request, in any of the dialects, into one checked call.

Rule: pure functions of the client's JSON. Every error is an InvalidRequestError whose ``param`` is the client's own
field. Unsupported fields that would change the order are refused by name; others are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.asking import read_truncate, refuse_too_many
from lmbridge.flask.openai.fields import BOOL, TEXT, Fields, Kind, integer

_TOP = integer(1, 2**31 - 1)


@dataclass(frozen=True)
class RerankCall:
    """One checked request.

    Attributes:
        field: the name of the list of documents in the request.
        query: a string.
        documents: at least one, as received: strings, or objects with a ``text``.
        top_n: how many of the best to return, or None for all.
        with_documents: repeat the documents in the response.
        truncate: what to do with a document that is too long for the model.
    """

    field: str
    query: str
    documents: list[Any]
    top_n: int | None
    with_documents: bool
    truncate: Literal["error", "end"]


def read_cohere(values: dict[str, Any]) -> RerankCall:
    """Read a body from Cohere's (v1 and v2), Jina's, vLLM's or infinity's clients: ``query`` and ``documents``."""
    fields = Fields(values)
    for name, kind in _UNANSWERABLE.items():
        fields.take(name, kind)
    return RerankCall(
        field="documents",
        query=_query(fields),
        documents=_documents(fields, "documents", _DOCUMENT),
        top_n=fields.take("top_n", _TOP),
        with_documents=fields.take("return_documents", BOOL, False),
        truncate=read_truncate(fields, "end"),
    )


def read_tei(values: dict[str, Any]) -> RerankCall:
    """Read a body from text-embeddings-inference's clients, with ``texts``, or from others, with ``documents``."""
    if "documents" in values and "texts" not in values:
        return read_cohere(values)
    fields = Fields(values)
    if "documents" in values:
        raise InvalidRequestError("Send texts or documents, not both.", "documents")
    fields.take("raw_scores", _NO_RAW_SCORES)
    fields.take("truncation_direction", _RIGHT)
    return RerankCall(
        field="texts",
        query=_query(fields),
        documents=_documents(fields, "texts", TEXT),
        top_n=fields.take("top_n", _TOP),
        with_documents=fields.take("return_text", BOOL, False) or fields.take("return_documents", BOOL, False),
        truncate=read_truncate(fields, "end"),
    )


# --- their parts ---


def _has_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("text"), str))


def _is_empty(value: object) -> bool:
    return value in (False, 0, "", [], {})


_DOCUMENT = Kind(_has_text, 'a string, or an object such as {"text": "…"}')
_LIST = Kind(lambda value: isinstance(value, list) and bool(value), "a list of at least one document")
_UNANSWERABLE = {
    "rank_fields": Kind(
        lambda value: value in ([], ["text"]), 'left out or ["text"] (this server ranks documents by their text)'
    ),
    "relevant_spans": Kind(
        lambda value: isinstance(value, dict) and value.get("mode") == "disabled",
        "left out (this server scores whole documents)",
    ),
    "instruction": Kind(_is_empty, "left out (this server's models take no instructions; add it to the query)"),
}
_NO_RAW_SCORES = Kind(
    lambda value: value is False, "false or left out (this server returns scores after the model's own activation)"
)
_RIGHT = Kind(
    lambda value: isinstance(value, str) and value.lower() == "right",
    '"right" or left out (this server cuts off the end)',
)


def _query(fields: Fields) -> str:
    query: str | None = fields.take("query", TEXT)
    if query is None:
        raise InvalidRequestError("query is missing; send the text to compare the documents with.", "query")
    return query


def _documents(fields: Fields, name: str, kind: Kind) -> list[Any]:
    documents: list[Any] | None = fields.take(name, _LIST)
    if documents is None:
        raise InvalidRequestError(f"{name} is missing; send the documents to rank.", name)
    refuse_too_many(len(documents), name)
    for place, document in enumerate(documents):
        if not kind.holds(document):
            Fields({f"{name}[{place}]": document}).refuse(f"{name}[{place}]", kind.expected)
    return documents
