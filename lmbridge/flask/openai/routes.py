"""The blueprint and its views.

Rule: HTTP only; ``reading`` reads bodies, ``answering`` uses the bridge, and ``writing`` writes answers.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Set
from typing import Any
from urllib.parse import unquote

from flask import Blueprint, Response
from werkzeug.exceptions import default_exceptions

from lmbridge.bridge import Bridge
from lmbridge.engines.models import DEMO
from lmbridge.flask.models import Models, current_models
from lmbridge.flask.openai import astray, guard
from lmbridge.flask.openai.answering import Answering
from lmbridge.flask.openai.asking import Asked
from lmbridge.flask.openai.embeddings import ask_embeddings, read_embeddings, write_embeddings
from lmbridge.flask.openai.errors import error_response
from lmbridge.flask.openai.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsForm, TokenTexts
from lmbridge.flask.openai.reading import Call, read_chat, read_completion
from lmbridge.flask.openai.responses.routes import register as register_responses
from lmbridge.flask.openai.writing import ChatWriter, CompletionWriter, Writer
from lmbridge.flask.sse import event_stream

blueprint = Blueprint("lmbridge_openai", __name__, url_prefix="/v1")
blueprint.before_request(guard.begin)
blueprint.after_request(guard.finish)
blueprint.register_error_handler(Exception, error_response)
for _status in default_exceptions:  # otherwise an app's own handlers of these would take precedence
    blueprint.register_error_handler(_status, error_response)
blueprint.record(astray.install)


@blueprint.post("/chat/completions", strict_slashes=False)
def chat_completions() -> Response:
    return _answer(read_chat, _chat_writer)


@blueprint.post("/completions", strict_slashes=False)
def completions() -> Response:
    return _answer(read_completion, _completion_writer)


@blueprint.post("/embeddings", strict_slashes=False)
def embeddings() -> Response:
    asked = Asked("embed")
    call = read_embeddings(asked.values)
    asked.log(call.texts)
    responses = ask_embeddings(call, asked.client, guard.unique_id(), asked.timeout)
    return _json(write_embeddings(responses, asked.model, call.base64))


register_responses(blueprint)


@blueprint.get("/models", strict_slashes=False)
def list_models() -> Response:
    models = current_models()
    return _json({"object": "list", "data": [_model(models, name) for name in models.names()]})


@blueprint.get("/models/<path:name>")
def show_model(name: str) -> Response:
    """Describe a model. Clients may encode the slash of ``org/model`` as ``%2F``, which some servers do not decode."""
    models = current_models()
    return _json(_model(models, name if name in models.names() else unquote(name)))


# --- their parts ---


def _answer(read: Callable[[dict[str, Any], Set[str]], Call], make_writer: Callable[..., Writer]) -> Response:
    asked = Asked("generate")
    bridge = current_models().bridge(asked.model)
    call = read(asked.values, current_models().supports(asked.model))
    asked.log(call.prompts)
    writer = make_writer(call, bridge, asked.model)
    answering = Answering(call, asked.client, writer, guard.unique_id(), asked.timeout)
    if not call.stream:
        return _json(answering.whole())
    return event_stream(*answering.stream(current_models().settings.heartbeat))


def _chat_writer(call: Call, bridge: Bridge, model: str) -> Writer:
    top = call.config.logprobs
    logprobs = None if top is None else ChatLogprobs(TokenTexts(bridge.token_texts, call.tokens_as_ids), top)
    return ChatWriter(*_facts(model), logprobs, call.include_usage, token_ids=call.token_ids)


def _completion_writer(call: Call, bridge: Bridge, model: str) -> Writer:
    logprobs: LogprobsForm | None = None
    if call.config.logprobs is not None or call.config.prompt_logprobs is not None:
        logprobs = CompletionLogprobs(TokenTexts(bridge.token_texts, call.tokens_as_ids), len(call.choices))
    echo = _echo(call.choices, TokenTexts(bridge.token_texts)) if call.echo else None
    return CompletionWriter(*_facts(model), logprobs, call.include_usage, echo, call.token_ids)


def _echo(prompts: list[Any], texts: TokenTexts) -> Callable[[int], str]:
    """Return the echo of an answer's prompt. The engine has the texts of token ids only once it is loaded."""
    return lambda index: prompts[index] if isinstance(prompts[index], str) else texts.joined(prompts[index])


def _facts(model: str) -> tuple[str, int, str]:
    return secrets.token_hex(12), int(time.time()), model


def _model(models: Models, name: str) -> dict[str, Any]:
    """A model's JSON. The member ``lmbridge`` is our own: the ``tasks``, if known, and whether the model is bundled."""
    facts = {"id": name, "object": "model", "created": models.created(name), "owned_by": "lmbridge"}
    ours: dict[str, Any] = {"tasks": tasks} if (tasks := sorted(models.tasks(name))) else {}
    if models.bridge(name).describe().partition(" on ")[0] == DEMO:
        ours["bundled"] = True
    return {**facts, "lmbridge": ours} if ours else facts


def _json(value: object) -> Response:
    return Response(json.dumps(value, allow_nan=False), mimetype="application/json")


# --- wrong methods and unknown paths below the prefix, whose errors have the envelope too ---


for _rule, _name, _method in (
    ("/chat/completions", "chat", "POST"),
    ("/completions", "completion", "POST"),
    ("/embeddings", "embedding", "POST"),
    ("/models", "models", "GET"),
    ("/models/<path:name>", "model", "GET"),
):
    guard.refuse_other_methods(blueprint, _rule, f"not_{_name}", _method)
for _rule, _name in (("/<path:rest>", "nothing"), ("", "root")):
    guard.refuse(blueprint, _rule, _name, astray.no_such_route, {*guard.METHODS, "OPTIONS"})
