"""An app to deploy: a view of its own, OpenAI's API, health and metrics.

Run it with ``gunicorn -c gunicorn.conf.py 'app:create_app()'`` in this folder, or with ``waitress-serve``.
"""

from __future__ import annotations

import os

from flask import Flask, Response, request
from werkzeug.middleware.proxy_fix import ProxyFix

from lmbridge.flask import LMBridge, current_bridge, openai, operations

lm = LMBridge()


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["LMBRIDGE_MODEL"] = os.environ.get("MODEL", "demo")
    app.config["LMBRIDGE_PRELOAD"] = True  # in the worker, as soon as it starts
    lm.init_app(app)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(operations.blueprint)
    if "BEHIND_PROXY" in os.environ:  # or every visitor has the proxy's address, and all share one place in the queue
        app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]

    @app.post("/tell")
    def tell() -> Response:
        return lm.stream_response(current_bridge.stream(request.get_data(as_text=True)))

    return app
