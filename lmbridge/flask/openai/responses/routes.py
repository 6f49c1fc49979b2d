"""The views of responses.

Rule: HTTP only. Reading a body, asking a bridge and writing an answer are done by the modules named after it.
"""

from __future__ import annotations

import json
from typing import NoReturn

from flask import Blueprint, Response
from werkzeug.exceptions import NotFound

from lmbridge.bridge import Bridge
from lmbridge.flask.models import current_models
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.asking import Asked
from lmbridge.flask.openai.logprobs import ChatLogprobs, TokenTexts
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.answering import Answering
from lmbridge.flask.openai.responses.reading import read_response
from lmbridge.flask.openai.responses.telling import Telling
from lmbridge.flask.openai.responses.writing import Form
from lmbridge.flask.sse import event_stream

_OF_KEPT = (("", "GET"), ("", "DELETE"), ("/cancel", "POST"), ("/input_items", "GET"))


def register(blueprint: Blueprint) -> None:
    """Add the routes."""
    blueprint.add_url_rule("/responses", "responses", create, methods=["POST"], strict_slashes=False)
    guard.refuse_other_methods(blueprint, "/responses", "not_responses", "POST")
    for rest, method in _OF_KEPT:
        name = f"kept_response{rest.replace('/', '_')}_{method.lower()}"
        guard.refuse(blueprint, f"/responses/<response_id>{rest}", name, none_kept, {method})


def create() -> Response:
    asked = Asked("generate")
    models = current_models()
    call = read_response(asked.values, models.supports(asked.model))
    asked.log(call.prompts)
    telling = Telling(Form(call, asked.model), _logprobs(call, models.bridge(asked.model)), call.reasoning)
    answering = Answering(call, asked.client, telling, guard.unique_id(), asked.timeout)
    if call.stream:
        return event_stream(*answering.stream(models.settings.heartbeat))
    return Response(json.dumps(answering.whole(), allow_nan=False), mimetype="application/json")


def none_kept(response_id: str) -> NoReturn:
    """For whoever asks for a response that was given before."""
    raise NotFound(
        f"There is no response {response_id} here: none is kept, so that none can be fetched, cancelled or deleted. "
        "Send the whole conversation as input, and close the connection of an answer that is not wanted."
    )


def _logprobs(call: Call, bridge: Bridge) -> ChatLogprobs | None:
    top = call.config.logprobs
    return None if top is None else ChatLogprobs(TokenTexts(bridge.token_texts, call.tokens_as_ids), top)
