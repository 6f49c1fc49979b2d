"""A Flask view that calls the model like any function; its requests run together on one engine.

Run it with ``python examples/flask_app.py [PORT]`` and ask, from several terminals at once::

    curl 'http://127.0.0.1:5000/infer?prompt=What+is+the+capital+of+France?'
"""

from __future__ import annotations

import sys

from flask import Flask, request
from werkzeug.serving import make_server

from lmbridge import Bridge, InvalidRequestError

app = Flask(__name__)
bridge = Bridge("demo")  # loads nothing yet


@app.get("/infer")
def infer() -> tuple[str, int]:
    try:
        return bridge.infer(request.args.get("prompt", ""), timeout=60).text, 200
    except InvalidRequestError as error:
        return str(error), 400


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with bridge, make_server("127.0.0.1", port, app, threaded=True) as server:
        print(f"Listening on http://127.0.0.1:{server.port}/infer?prompt=...", flush=True)
        server.serve_forever()
