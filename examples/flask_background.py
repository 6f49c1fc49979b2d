"""A Flask view that starts a job and returns; ``GET /jobs/0`` then gives the first job's answers.

Run it with ``python examples/flask_background.py [PORT]``, and start a job::

    curl http://127.0.0.1:5000/jobs -d 'prompt=What is the capital of Peru?'
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from flask import Flask, abort, request

from lmbridge import Client
from lmbridge.flask import LMBridge

app = Flask(__name__)
app.config["LMBRIDGE_MODEL"] = "demo"
lm = LMBridge(app)
pool = ThreadPoolExecutor(4)
jobs: dict[int, Future[list[str]]] = {}
numbers = count()
KEPT = 1000  # jobs; older ones are forgotten


def work(client: Client, prompts: list[str]) -> list[str]:  # not current_bridge: its requests end with the view
    with client:
        return [client.infer(prompt).text for prompt in prompts]


@app.post("/jobs")
def start() -> tuple[dict[str, int], int]:
    number = next(numbers)
    jobs[number] = pool.submit(work, lm.models.bridge().client("jobs"), request.form.getlist("prompt"))
    jobs.pop(number - KEPT, None)
    return {"job": number}, 202


@app.get("/jobs/<int:job>")
def result(job: int) -> dict[str, list[str] | None]:
    found = jobs.get(job) or abort(404)
    return {"texts": found.result() if found.done() else None}


if __name__ == "__main__":
    with app.app_context():  # jobs that wait at Ctrl-C are still done, but a model can no longer be loaded then
        lm.models.bridge().start()
    app.run(port=int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
