"""A small Flask app over a model, as it goes into production; its tests beside it need no model.

Run it in this folder with ``flask run``; run its tests with ``python -m pytest`` here, or with
``python -m pytest examples/testing`` at the top.
"""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, request

from lmbridge.flask import LMBridge, current_bridge

lm = LMBridge()


def create_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_TIMEOUT": 30.0, **config})
    lm.init_app(app)

    @app.post("/ask")
    def ask() -> dict[str, str]:
        return {"text": current_bridge.infer(request.form["prompt"]).text}

    @app.post("/tell")
    def tell() -> Response:
        return lm.stream_response(current_bridge.stream(request.form["prompt"]))

    return app
