"""What runs beside the answers: liveness, readiness, metrics, status, and the exchange of a model.

Rule: reads what the bridges say of themselves; only ``/ready`` starts one, and only ``/admin/swap`` changes one. Every
route but that answers at once, however busy the engine is.

=================== ============================================================================================
route               what it says
=================== ============================================================================================
GET /health         200 while the process can serve or may come to; 503 when only a restart helps
GET /ready          200 while every model serves; else 503 with each state. Asking loads what was not loaded yet
GET /metrics        Prometheus
GET /status         the same in JSON, for a page to show
POST /admin/swap    exchange a model under its name; 404 unless ``LMBRIDGE_ADMIN_KEY`` is set
=================== ============================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

from flask import Blueprint, Flask, Response, abort, request
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import get_input_stream

from lmbridge.bridge import Bridge
from lmbridge.errors import LMBridgeError
from lmbridge.flask.answers import count_answers, current_answers
from lmbridge.flask.errors import http_error
from lmbridge.flask.keys import bearer, is_known
from lmbridge.flask.models import Models, current_models
from lmbridge.flask.openai.fields import parse_object
from lmbridge.flask.swap import exchange, parse_order
from lmbridge.metrics import Histogram
from lmbridge.prometheus import BridgeCollector, mean_batch_size

LOOP_PATIENCE = 60.0  # seconds without a sign of life of a server thread after which it is taken for dead

blueprint = Blueprint("lmbridge_operations", __name__)
blueprint.record_once(lambda state: count_answers(cast(Flask, state.app)))
_started = time.monotonic()


# --- probes ---


@blueprint.get("/health")
def health() -> tuple[dict[str, Any], int]:
    """Whether a restart would help: a model that is down for good, or a server thread that is stuck."""
    models = current_models()
    faults = {name: fault for name in models.names() if (fault := _fault(models.bridge(name)))}
    return {"status": "failed" if faults else "ok", "models": _states(models), "faults": faults}, 503 if faults else 200


def _fault(bridge: Bridge) -> str:
    """Why this bridge will not serve again by itself; "" while it may."""
    health = bridge.health()
    if health.state == "failed":
        return health.reason or "failed"
    return f"its server thread has been stuck for {health.silent:.0f} s" if health.silent > LOOP_PATIENCE else ""


@blueprint.get("/ready")
def ready() -> tuple[dict[str, Any], int, dict[str, str]]:
    """Whether requests are served now; begins to load what nobody has asked for yet."""
    models = current_models()
    if not models.draining:
        for name in models.names():
            models.load(name)
    states = _states(models)
    serving = not models.draining and all(state["state"] in ("ready", "unloaded") for state in states.values())
    answer = {"ready": serving, "draining": models.draining, "models": states}
    return answer, 200 if serving else 503, {} if serving else {"Retry-After": "1"}


def _states(models: Models) -> dict[str, dict[str, str]]:
    found = {}
    for name in models.names():
        health = models.bridge(name).health()
        engine = models.bridge(name).describe()
        found[name] = {"state": health.state, "reason": health.reason, "engine": engine}
    return found


# --- numbers ---


@blueprint.get("/metrics")
def metrics() -> Response:
    """What Prometheus scrapes: every model's metrics with the label ``model``, the app's, and the process's own."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()  # one for each scrape: apps in one process must not share, and it costs little
    registry.register(_ModelsCollector(current_models()))
    registry.register(current_answers())
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), content_type=content_type)


class _ModelsCollector:
    """Several bridges' metrics as one: a family must not be written twice, so the same one of each model is joined."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        families: dict[str, Any] = {}
        for name in self._models.names():
            for family in BridgeCollector(self._models.bridge(name), {"model": name}).collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()
        text = "Requests ended because their HTTP client went away."
        yield CounterMetricFamily("lmbridge_http_disconnects", text, value=self._models.disconnects)


@blueprint.get("/status")
def status() -> dict[str, Any]:
    """What a page shows; times are sums of seconds, so that two looks give a mean of what lies between."""
    models = current_models()
    return {
        "uptime": time.monotonic() - _started,
        "draining": models.draining,
        "disconnects": models.disconnects,
        "default": models.default,
        "models": {
            name: {"tasks": sorted(models.tasks(name)), **_numbers(models.bridge(name))} for name in models.names()
        },
    }


def _numbers(bridge: Bridge) -> dict[str, Any]:
    health, counted, engine = bridge.health(), bridge.metrics, bridge.stats()
    return {
        "state": health.state,
        "reason": health.reason,
        "restarts": health.restarts,
        "waiting": health.waiting,
        "running": health.running,
        "requests": dict(counted.outcomes),
        "cancels": counted.cancels,
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "queued": _sum(counted.queued),
        "first_token": _sum(counted.first_token),
        "inter_token": _sum(counted.inter_token),
        "total": _sum(counted.total),
        "engine": engine,
        "mean_batch_size": mean_batch_size(engine),
    }


def _sum(histogram: Histogram) -> dict[str, float]:
    return {"sum": histogram.sum, "count": histogram.count}


# --- the exchange of a model ---


@blueprint.post("/admin/swap")
def swap() -> Response:
    """Exchange a model, and tell how it goes in one JSON object a line; see ``lmbridge.flask.swap``."""
    models, settings = current_models(), current_models().settings
    _check_admin_key(settings.admin_key)
    body = get_input_stream(request.environ, max_content_length=settings.max_request_bytes).read()
    order = parse_order(parse_object(body), models.default, settings.allow_remote_code)
    news = exchange(models.bridge(order.model), order)
    return Response(news, mimetype="application/x-ndjson", headers={"Cache-Control": "no-store"})


def _check_admin_key(key: str | None) -> None:
    if key is None:
        abort(404)
    given = bearer(request.headers.get("Authorization"))
    if given is None or not is_known(given, [key]):
        abort(401, "This needs the admin key, as `Authorization: Bearer ...`.")


@blueprint.errorhandler(LMBridgeError)
@blueprint.errorhandler(HTTPException)
def _refuse(error: LMBridgeError | HTTPException) -> tuple[dict[str, str], int, dict[str, str]]:
    told = http_error(error)
    return {"error": told.message, "type": type(error).__name__}, told.status, told.headers
