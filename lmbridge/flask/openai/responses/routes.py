"""The views of responses.

Rule: HTTP only; ``reading`` reads bodies, ``answering`` uses the bridge, and ``writing`` writes answers.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NoReturn, cast

from flask import Blueprint, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotFound

from lmbridge.bridge import Bridge
from lmbridge.flask.models import current_models
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.asking import Asked
from lmbridge.flask.openai.logprobs import ChatLogprobs, TokenTexts
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.answering import Answering
from lmbridge.flask.openai.responses.memory import Memory
from lmbridge.flask.openai.responses.output import Reasoning, Summary, TextItem
from lmbridge.flask.openai.responses.reading import read_response, wants_summary
from lmbridge.flask.openai.responses.telling import Telling
from lmbridge.flask.openai.responses.writing import Form
from lmbridge.flask.sse import event_stream

_MEMORY = "lmbridge_responses"  # the app's extension
_OF_KEPT = (("", "GET"), ("", "DELETE"), ("/cancel", "POST"), ("/input_items", "GET"))


def register(blueprint: Blueprint) -> None:
    """Add the routes, and give each app a memory."""
    blueprint.record(_give_memory)
    blueprint.add_url_rule("/responses", "responses", create, methods=["POST"], strict_slashes=False)
    guard.refuse_other_methods(blueprint, "/responses", "not_responses", "POST")
    for rest, method in _OF_KEPT:
        name = f"kept_response{rest.replace('/', '_')}_{method.lower()}"
        guard.refuse(blueprint, f"/responses/<response_id>{rest}", name, none_kept, {method})


def create() -> Response:
    asked = Asked("generate")
    models = current_models()
    memory, account = cast(Memory, current_app.extensions[_MEMORY]), models.account(request)
    call = read_response(asked.values, models.supports(asked.model), partial(memory.find, account))
    asked.log(call.prompts)
    telling = Telling(Form(call, asked.model), _logprobs(call, models.bridge(asked.model)), _reasoning(call))
    remember = partial(memory.remember, account) if call.fields.value("store", True) else _forget
    answering = Answering(call, asked.client, telling, guard.unique_id(), asked.timeout, remember)
    if call.stream:
        return event_stream(*answering.stream(models.settings.heartbeat))
    return Response(json.dumps(answering.whole(), allow_nan=False), mimetype="application/json")


def none_kept(response_id: str) -> NoReturn:
    """Refuse to fetch, cancel or delete an earlier response."""
    raise NotFound(
        f"There is no response {response_id}: this server does not store responses, so they cannot be fetched, "
        "cancelled or deleted. Send the whole conversation as input; to cancel an answer, close its connection."
    )


def _give_memory(state: BlueprintSetupState) -> None:
    state.app.extensions.setdefault(_MEMORY, Memory())


def _reasoning(call: Call) -> type[TextItem] | None:
    if not call.reasoning:
        return None
    return Summary if wants_summary(call.fields) else Reasoning


def _forget(items: list[dict[str, Any]]) -> None:
    pass


def _logprobs(call: Call, bridge: Bridge) -> ChatLogprobs | None:
    top = call.config.logprobs
    return None if top is None else ChatLogprobs(TokenTexts(bridge.token_texts, call.tokens_as_ids), top)
