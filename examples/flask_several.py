"""Flask views that ask several questions: at once, at once in one stream, and one after another while streaming.

Run it with ``python examples/flask_several.py [PORT]``, and ask ``/at-once``, ``/stream`` or ``/in-turn``::

    curl -N http://127.0.0.1:5000/stream -d 'prompt=What is the capital of Peru?' \\
        -d 'prompt=What is the opposite of hot?'
"""

from __future__ import annotations

import sys
from itertools import chain

from flask import Flask, Response, request, stream_with_context

from lmbridge import InvalidRequestError
from lmbridge.flask import LMBridge, current_bridge

app = Flask(__name__)
app.config["LMBRIDGE_MODEL"] = "demo"
lm = LMBridge(app)


@app.post("/at-once")
def at_once() -> list[str]:
    futures = [current_bridge.submit(prompt) for prompt in request.form.getlist("prompt")]
    return [future.result().text for future in futures]


@app.post("/stream")
def stream() -> Response:
    return lm.stream_response(current_bridge.stream_many(request.form.getlist("prompt")))


@app.post("/in-turn")
def in_turn() -> Response:
    first, *others = request.form.getlist("prompt") or [""]
    begun = current_bridge.infer(first).text + "\n"  # an error here still gives the response its status
    return Response(stream_with_context(chain([begun], map(line, others))), mimetype="text/plain")


def line(prompt: str) -> str:
    try:
        return current_bridge.infer(prompt).text + "\n"
    except InvalidRequestError as error:  # the others are answered all the same
        return f"{error.message}\n"


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
