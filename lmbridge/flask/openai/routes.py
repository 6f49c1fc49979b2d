"""The blueprint and its views.

Rule: HTTP only. Reading a body, asking a bridge and writing an answer are done by the modules named after it.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Set
from typing import Any, NoReturn

from flask import Blueprint, Response
from werkzeug.exceptions import MethodNotAllowed, NotFound

from lmbridge.bridge import Bridge
from lmbridge.flask.caller import request_bridge
from lmbridge.flask.models import Models, current_models
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.answering import Answering
from lmbridge.flask.openai.errors import error_response
from lmbridge.flask.openai.fields import parse_object
from lmbridge.flask.openai.logprobs import ChatLogprobs, CompletionLogprobs, LogprobsForm, TokenTexts
from lmbridge.flask.openai.reading import Call, read_chat, read_completion, read_model
from lmbridge.flask.openai.writing import ChatWriter, CompletionWriter, Writer
from lmbridge.flask.sse import event_stream
from lmbridge.messages import GenerationConfig

logger = logging.getLogger(__name__)

_EVERYTHING = frozenset(GenerationConfig().__dict__)  # while an engine loads; it says itself what it cannot do
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}

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


@blueprint.get("/models")
def list_models() -> Response:
    models = current_models()
    return _json({"object": "list", "data": [_model(models, name) for name in models.names()]})


@blueprint.get("/models/<path:name>")
def show_model(name: str) -> Response:
    return _json(_model(current_models(), name))


# --- their parts ---


def _answer(read: Callable[[dict[str, Any], Set[str]], Call], make_writer: Callable[..., Writer]) -> Response:
    models = current_models()
    models.check_open()
    settings = models.settings
    values = parse_object(guard.read_body(settings.max_request_bytes))
    name = read_model(values) or models.default
    bridge = models.bridge(name)
    call = read(values, bridge.supports() or _EVERYTHING)
    if settings.log_prompts:
        logger.info("%s asks %s: %r", guard.request_id(), name, call.prompts)
    timeout = min((limit for limit in (call.timeout, settings.timeout) if limit is not None), default=None)
    writer = make_writer(call, bridge, name)
    answering = Answering(call, request_bridge(name), writer, guard.unique_id(), timeout)
    if not call.stream:
        return _json(answering.whole())
    return event_stream(*answering.stream(settings.heartbeat))


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
    return {"id": name, "object": "model", "created": models.created(name), "owned_by": "lmbridge"}


def _json(value: object) -> Response:
    return Response(json.dumps(value), mimetype="application/json")


# --- whatever else is asked for under the prefix gets its error in the envelope too ---


def _no_such_route(rest: str = "") -> NoReturn:
    raise NotFound("There is no such route here; there are chat/completions, completions, models and models/{id}.")


def _wrong_method(valid: str) -> Callable[..., NoReturn]:
    def refuse(**arguments: str) -> NoReturn:
        raise MethodNotAllowed([valid], f"This route takes {valid} only.")

    return refuse


def _add(rule: str, endpoint: str, view: Callable[..., NoReturn], methods: set[str]) -> None:
    blueprint.add_url_rule(rule, endpoint, view, methods=methods, provide_automatic_options=False, strict_slashes=False)


for _rule, _name, _method in (
    ("/chat/completions", "chat", "POST"),
    ("/completions", "completion", "POST"),
    ("/models", "models", "GET"),
    ("/models/<path:name>", "model", "GET"),
):
    _add(_rule, f"not_{_name}", _wrong_method(_method), _METHODS - {_method})
_add("/<path:rest>", "nothing", _no_such_route, {*_METHODS, "OPTIONS"})
_add("", "root", _no_such_route, {*_METHODS, "OPTIONS"})
