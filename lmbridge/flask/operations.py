"""Routes for operators: liveness, readiness, metrics, status, and swapping a model.

Rule: reads the state of the bridges; only ``/ready`` starts one, and only ``/admin/swap`` changes one. All routes but
the last respond at once, however busy the engine is.

=================== ============================================================================================
route               response
=================== ============================================================================================
GET /health         200 while the process serves or may recover; 503 if only a restart helps
GET /ready          200 while every model serves; else 503 with their states. Starts loading models not loaded yet
GET /metrics        metrics for Prometheus
GET /status         the same figures in JSON, for a web page
POST /admin/swap    swaps the model behind a name; 404 unless ``LMBRIDGE_ADMIN_KEY`` is set
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

LOOP_PATIENCE = 60.0  # seconds of silence after which a server thread counts as stuck

blueprint = Blueprint("lmbridge_operations", __name__)
blueprint.record_once(lambda state: count_answers(cast(Flask, state.app)))
_started = time.monotonic()


# --- probes ---


@blueprint.get("/health")
def health() -> tuple[dict[str, Any], int]:
    """Report whether the process needs a restart: a model failed for good, or a server thread is stuck."""
    models = current_models()
    faults = {name: fault for name in models.names() if (fault := _fault(models.bridge(name)))}
    return {"status": "failed" if faults else "ok", "models": _states(models), "faults": faults}, 503 if faults else 200


def _fault(bridge: Bridge) -> str:
    """Why this bridge cannot recover by itself; empty if it can."""
    health = bridge.health()
    if health.state == "failed":
        return health.reason or "failed"
    return f"its server thread has been stuck for {health.silent:.0f} s" if health.silent > LOOP_PATIENCE else ""


@blueprint.get("/ready")
def ready() -> tuple[dict[str, Any], int, dict[str, str]]:
    """Report whether all models serve requests now; start loading those that nobody has used yet."""
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
    """Metrics for Prometheus: each model's, with the label ``model``, the app's, and the process's."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()  # one per scrape: apps in one process must not share one, and it is cheap
    registry.register(_ModelsCollector(current_models()))
    registry.register(current_answers())
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), content_type=content_type)


class _ModelsCollector:
    """Merges the metrics of several bridges: each family may appear only once, with the samples of all models."""

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
        text = "Requests ended because their HTTP client disconnected."
        yield CounterMetricFamily("lmbridge_http_disconnects", text, value=self._models.disconnects)


@blueprint.get("/status")
def status() -> dict[str, Any]:
    """Figures for a web page; times are sums of seconds, so that two readings give the mean between them."""
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


# --- swapping a model ---


@blueprint.post("/admin/swap")
def swap() -> Response:
    """Swap a model, and report progress as JSON objects, one per line; see ``lmbridge.flask.swap``."""
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
        abort(401, "This route requires the admin key; send it as `Authorization: Bearer KEY`.")


@blueprint.errorhandler(LMBridgeError)
@blueprint.errorhandler(HTTPException)
def _refuse(error: LMBridgeError | HTTPException) -> tuple[dict[str, str], int, dict[str, str]]:
    told = http_error(error)
    return {"error": told.message, "type": type(error).__name__}, told.status, told.headers
