"""Flask views that call the model like any function; requests that arrive together run together on one engine.

Run it with ``python examples/flask_app.py [PORT]`` and ask, from several terminals at once::

    curl 'http://127.0.0.1:5000/infer?prompt=What+is+the+capital+of+France?'
    curl -N 'http://127.0.0.1:5000/stream?prompt=Tell+me+a+story+about+an+owl.'
"""

from __future__ import annotations

import sys

from flask import Flask, Response, request
from werkzeug.serving import make_server

from lmbridge.flask import LMBridge, current_bridge

app = Flask(__name__)
app.config["LMBRIDGE_MODEL"] = "demo"
lm = LMBridge(app)  # loads at the first request


@app.get("/infer")
def infer() -> str:
    return current_bridge.infer(request.args.get("prompt", ""), timeout=60).text  # a wrong prompt is answered with 400


@app.get("/stream")
def stream() -> Response:
    return lm.stream_response(current_bridge.stream(request.args.get("prompt", "")))  # stops when the reader leaves


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with make_server("127.0.0.1", port, app, threaded=True) as server:
        print(f"Listening on http://127.0.0.1:{server.port}/infer?prompt=...", flush=True)
        server.serve_forever()
