"""Flask views that stream an answer, as server-sent events and as plain text, and a page that reads the events.

Run it with ``python examples/flask_streaming.py [PORT]``, and open http://127.0.0.1:5000 or ask::

    curl -N http://127.0.0.1:5000/events -d 'prompt=Tell me a story about an owl.'
    curl -N http://127.0.0.1:5000/text -d 'prompt=Tell me a story about an owl.'
"""

from __future__ import annotations

import sys
from itertools import chain

from flask import Flask, Response, request, send_file

from lmbridge.flask import LMBridge, current_bridge

app = Flask(__name__)
app.config["LMBRIDGE_MODEL"] = "demo"
lm = LMBridge(app)


@app.post("/events")
def events() -> Response:
    return lm.stream_response(current_bridge.stream(request.form["prompt"]))


@app.post("/text")
def text() -> Response:
    stream = current_bridge.stream(request.form["prompt"])
    first = next(stream)
    if first.error:  # raised here, it still gives the response its status
        raise first.error
    texts = (delta.text for delta in chain([first], stream))
    return Response(texts, mimetype="text/plain", headers={"X-Accel-Buffering": "no"})


@app.get("/")
def page() -> Response:
    return send_file("flask_streaming.html")


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
