"""Embeddings for OpenAI's clients.

Rule: reading and writing are pure functions of JSON; asking works with any Client, on the thread of the HTTP request.
Each input is a separate request to the bridge, so that the inputs of many clients share batches.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmbridge import Client, InvalidRequestError, LMBridgeError, Response
from lmbridge.flask.openai.asking import put_in_clients_words, read_truncate, refuse_too_many
from lmbridge.flask.openai.fields import (
    BOOL,
    LARGEST_ID,
    TEXT,
    Fields,
    Kind,
    are_ids,
    integer,
    is_int,
    plain_ids,
)

_ENCODING = Kind(lambda value: value in ("float", "base64"), '"float" or "base64"')
_DIMENSIONS = integer(1, LARGEST_ID)
_FOR_ALL = ("dimensions", "prompt")  # fields that concern every input alike


@dataclass(frozen=True)
class EmbeddingCall:
    """One checked request.

    Attributes:
        texts: one text, as a string or token ids, or a list of texts.
        options: options of ``embed``.
        base64: write vectors as base64 of little-endian float32.
    """

    texts: Any
    options: dict[str, Any]
    base64: bool


def read_embeddings(values: dict[str, Any]) -> EmbeddingCall:
    """Read a body of ``embeddings``.

    Raises:
        InvalidRequestError: a field is missing or invalid; ``param`` names it.
    """
    fields = Fields(values)
    fields.take("user", TEXT)  # checked but ignored: clients cannot choose their account
    options = {
        "dimensions": fields.take("dimensions", _DIMENSIONS),
        "normalize": fields.take("normalize", BOOL, True),
        "prompt": fields.take("prompt", TEXT),
        "truncate": read_truncate(fields, "error"),
    }
    return EmbeddingCall(
        texts=_read_texts(fields),
        options=options,
        base64=fields.take("encoding_format", _ENCODING, "float") == "base64",
    )


def ask_embeddings(call: EmbeddingCall, bridge: Client, request_id: str, timeout: float | None) -> list[Response]:
    """Wait for one Response per text, with its vector as ``value``.

    Raises:
        LMBridgeError: the first error, with the client's field names; the other texts are aborted.
    """
    try:
        found = bridge.embed(call.texts, details=True, request_id=request_id, timeout=timeout, **call.options)
    except LMBridgeError as error:
        put_in_clients_words(error, "input", _FOR_ALL)
        raise
    return found if isinstance(found, list) else [found]


def write_embeddings(responses: Sequence[Response], model: str, as_base64: bool) -> dict[str, Any]:
    """The JSON object of the response, with the vectors in the order of the texts."""
    import numpy as np

    data = []
    for index, response in enumerate(responses):
        vector = np.asarray(response.value, dtype="<f4")
        written = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": written})
    tokens = sum(response.usage.prompt_tokens for response in responses)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


# --- inputs ---


def _are_inputs(value: object) -> bool:
    if isinstance(value, str) or are_ids(value):
        return True
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, str) for item in value) or all(map(are_ids, value))


_INPUT = Kind(
    _are_inputs,
    "a string, a list of strings, a list of token ids or a list of such lists, with at least one of them",
    plain_ids,
)


def _read_texts(fields: Fields) -> Any:
    given = fields.take("input", _INPUT)
    if given is None:
        raise InvalidRequestError("input is missing; send the texts to embed.", "input")
    if isinstance(given, list) and not is_int(given[0]):
        refuse_too_many(len(given), "input")
    return given
