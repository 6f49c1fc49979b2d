"""The blueprint and its views.

Rule: HTTP only. Reading a body, asking a bridge and writing an answer are done by the modules named after it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Set
from typing import Any, NoReturn

from flask import Blueprint, Response
from werkzeug.exceptions import NotFound

from lmbridge.bridge import Bridge
from lmbridge.flask.models import Models, current_models
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.answering import Answering
from lmbridge.flask.openai.asking import Asked
from lmbridge.flask.openai.embeddings import ask_embeddings, read_embeddings, write_embeddings
from lmbridge.flask.openai.errors import error_response
from lmbridge.flask.openai.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsForm, TokenTexts
from lmbridge.flask.openai.reading import Call, read_chat, read_completion
from lmbridge.flask.openai.writing import ChatWriter, CompletionWriter, Writer
from lmbridge.flask.sse import event_stream
from lmbridge.messages import GenerationConfig

_EVERYTHING = frozenset(GenerationConfig().__dict__)  # while an engine loads; it says itself what it cannot do

blueprint = Blueprint("lmbridge_openai", __name__, url_prefix="/v1")
blueprint.before_request(guard.begin)
blueprint.after_request(guard.finish)
blueprint.register_error_handler(Exception, error_response)


@blueprint.post("/chat/completions")
def chat_completions() -> Response:
    return _answer(read_chat, _chat_writer)


@blueprint.post("/completions")
def completions() -> Response:
    return _answer(read_completion, _completion_writer)


@blueprint.post("/embeddings")
def embeddings() -> Response:
    asked = Asked("embed")
    call = read_embeddings(asked.values)
    asked.log(call.texts)
    responses = ask_embeddings(call, asked.client, guard.unique_id(), asked.timeout)
    return _json(write_embeddings(responses, asked.model, call.base64))


@blueprint.get("/models")
def list_models() -> Response:
    models = current_models()
    return _json({"object": "list", "data": [_model(models, name) for name in models.names()]})


@blueprint.get("/models/<path:name>")
def show_model(name: str) -> Response:
    return _json(_model(current_models(), name))


# --- their parts ---


def _answer(read: Callable[[dict[str, Any], Set[str]], Call], make_writer: Callable[..., Writer]) -> Response:
    asked = Asked("generate")
    bridge = current_models().bridge(asked.model)
    call = read(asked.values, bridge.supports() or _EVERYTHING)
    asked.log(call.prompts)
    writer = make_writer(call, bridge, asked.model)
    answering = Answering(call, asked.client, writer, guard.unique_id(), asked.timeout)
    if not call.stream:
        return _json(answering.whole())
    return event_stream(*answering.stream(current_models().settings.heartbeat))


def _chat_writer(call: Call, bridge: Bridge, model: str) -> Writer:
    top = call.config.logprobs
    logprobs = None if top is None else ChatLogprobs(TokenTexts(bridge.token_texts), top)
    return ChatWriter(*_facts(model), logprobs, call.include_usage)


def _completion_writer(call: Call, bridge: Bridge, model: str) -> Writer:
    echoed = [text for text in call.echoed for _ in range(call.n)]
    logprobs: LogprobsForm | None = None
    if call.config.logprobs is not None:
        logprobs = CompletionLogprobs(TokenTexts(bridge.token_texts), len(call.choices))
    return CompletionWriter(*_facts(model), logprobs, call.include_usage, echoed)


def _facts(model: str) -> tuple[str, int, str]:
    return secrets.token_hex(12), int(time.time()), model


def _model(models: Models, name: str) -> dict[str, Any]:
    """``lmbridge.tasks`` is ours: what the model does, where that is known."""
    facts = {"id": name, "object": "model", "created": models.created(name), "owned_by": "lmbridge"}
    tasks = sorted(models.tasks(name))
    return {**facts, "lmbridge": {"tasks": tasks}} if tasks else facts


def _json(value: object) -> Response:
    return Response(json.dumps(value, allow_nan=False), mimetype="application/json")


# --- whatever else is asked for under the prefix gets its error in the envelope too ---


def _no_such_route(rest: str = "") -> NoReturn:
    raise NotFound(
        "There is no such route here; there are chat/completions, completions, embeddings, models and models/{id}."
    )


for _rule, _name, _method in (
    ("/chat/completions", "chat", "POST"),
    ("/completions", "completion", "POST"),
    ("/embeddings", "embedding", "POST"),
    ("/models", "models", "GET"),
    ("/models/<path:name>", "model", "GET"),
):
    guard.refuse_other_methods(blueprint, _rule, f"not_{_name}", _method)
for _rule, _name in (("/<path:rest>", "nothing"), ("", "root")):
    guard.refuse(blueprint, _rule, _name, _no_such_route, {*guard.METHODS, "OPTIONS"})
