"""``lmbridge serve`` beside what else would serve the bundled model over HTTP, each in a process of its own.

- lmbridge: ``lmbridge serve demo``
- transformers: ``transformers serve --continuous-batching``; with one computing thread, which suits a model this small,
  as lmbridge chooses itself; ``transformers-own`` leaves the number to it
- lock: a Flask view on Werkzeug's threaded server that streams from ``model.generate`` behind a lock

Each streams chat completions to as many clients as asked, read by one loop over raw sockets in this process:
tokens a second, milliseconds to the first token (p50 and p99), CPU seconds of the server, and answers that differ from
those of the model alone. Then it says which settings of a request each server ignores.

Run: ``python -m tests.benchmarks.http_peers [--streams 32,64] [--rounds 3] [--servers lmbridge,transformers,lock]``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from lmbridge import Bridge
from lmbridge.engines.models import DEMO_FOLDER
from tests.benchmarks.engine_speed import Serve
from tests.benchmarks.main_job import make_prompts
from tests.benchmarks.measure import interleave, print_table

LIMIT = 120.0  # seconds for anything a client waits for
TOKENS = 200


# --- the servers ---


@dataclass
class Server:
    """A server as its clients see it."""

    name: str
    port: int
    model: str
    process: psutil.Process

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        times = [process.cpu_times() for process in [self.process, *self.process.children(recursive=True)]]
        return float(sum(spent.user + spent.system for spent in times))


@contextlib.contextmanager
def lmbridge_serve() -> Iterator[Server]:
    command = [sys.executable, "-m", "lmbridge", "serve", "demo", "--port", "0", "--no-page"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("Listening on ")).split()[2].rstrip(",")
        next(line for line in process.stdout if "is ready" in line)
        try:
            yield Server("lmbridge", int(url.rpartition(":")[2]), "demo", psutil.Process(process.pid))
        finally:
            process.terminate()
            process.communicate(timeout=60)


@contextlib.contextmanager
def transformers_serve(threads: int) -> Iterator[Server]:
    with contextlib.closing(Serve(str(DEMO_FOLDER), TOKENS, threads)) as serve:
        yield Server("transformers", serve.port, str(DEMO_FOLDER), psutil.Process(serve._process.pid))


@contextlib.contextmanager
def locked_view() -> Iterator[Server]:
    with tempfile.TemporaryFile() as log, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        command = [sys.executable, "-m", "tests.benchmarks.http_peers", "--be-locked-view", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(port)
            yield Server("lock", port, "demo", psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    raise RuntimeError("the locked view did not start")


def be_locked_view(port: int) -> None:
    """What one writes first: the model, a lock, a thread that generates, a stream of its text."""
    import torch
    import transformers
    from flask import Flask, Response, request

    torch.set_num_threads(1)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    lock, app = threading.Lock(), Flask(__name__)

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        body = request.get_json()
        prompt = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

        def stream() -> Iterator[str]:
            with lock:
                texts = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": texts}
                worker = threading.Thread(target=model.generate, kwargs={**prompt, **options})
                worker.start()
                for text in texts:
                    yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"
                worker.join()
            yield "data: [DONE]\n\n"

        return Response(stream(), mimetype="text/event-stream")

    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app.run("127.0.0.1", port, threaded=True)


SERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
    "lmbridge": lmbridge_serve,
    "transformers": functools.partial(transformers_serve, 1),
    "transformers-own": functools.partial(transformers_serve, 0),
    "lock": locked_view,
}


# --- the client ---


@dataclass
class Reader:
    """One connection that has asked for a streamed answer."""

    server: Server
    body: dict[str, Any]
    data: bytes = b""
    first: float | None = None
    ended: float | None = None
    socket: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        payload = json.dumps({"model": self.server.model, **self.body}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", self.server.port))
        self.began = time.monotonic()
        self.socket.sendall(head.encode() + payload)
        self.socket.setblocking(False)

    def receive(self) -> None:
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.ended = time.monotonic()
            return
        self.data += data
        if self.first is None and any(_content(chunk) for chunk in self.chunks()):
            self.first = time.monotonic()

    def chunks(self) -> list[dict[str, Any]]:
        """The whole events so far; for an answer that does not stream, its one body."""
        _, _, body = self.data.partition(b"\r\n\r\n")
        if body.startswith(b"{"):
            with contextlib.suppress(ValueError):
                return [json.loads(body)]
            return []
        lines = body[: body.rfind(b"\n") + 1].splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    @property
    def text(self) -> str:
        return "".join(map(_content, self.chunks()))


def _content(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices") or [{}]
    return (choices[0].get("delta") or choices[0].get("message") or {}).get("content") or ""


def read_all(readers: list[Reader]) -> None:
    end = time.monotonic() + LIMIT
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        while selector.get_map():
            if time.monotonic() > end:
                raise TimeoutError(f"{readers[0].server.name} did not finish")
            for key, _ in selector.select(0.5):
                key.data.receive()
                if key.data.ended is not None:
                    selector.unregister(key.fileobj)
                    key.data.socket.close()


def ask(server: Server, prompt: str, **settings: Any) -> Reader:
    """One answer, alone."""
    reader = Reader(server, {"messages": [{"role": "user", "content": prompt}], "max_tokens": 60, **settings})
    read_all([reader])
    return reader


# --- what is measured ---


@dataclass
class Figures:
    """One round of one server."""

    tokens_s: float
    first_p50_ms: float
    first_p99_ms: float
    cpu_s: float
    wrong_answers: float


def crowd(server: Server, prompts: list[str], right: list[str], tokens: int) -> Figures:
    cpu, began = server.cpu(), time.monotonic()
    options = {"stream": True, "temperature": 0, "max_tokens": TOKENS}
    readers = [Reader(server, {"messages": [{"role": "user", "content": prompt}], **options}) for prompt in prompts]
    read_all(readers)
    seconds = time.monotonic() - began
    firsts = sorted(((reader.first or reader.began + LIMIT) - reader.began) * 1e3 for reader in readers)
    wrong = sum(reader.text.strip() != answer.strip() for reader, answer in zip(readers, right, strict=True))
    p99 = firsts[min(len(firsts) - 1, int(len(firsts) * 0.99))]
    return Figures(tokens / seconds, statistics.median(firsts), p99, server.cpu() - cpu, wrong)


def references(prompts: list[str]) -> tuple[list[str], int]:
    """What the model says alone, one prompt after the other, and how many tokens that is."""
    with Bridge("demo") as bridge:
        responses = [bridge.infer(prompt, max_new_tokens=TOKENS) for prompt in prompts]
    return [response.text for response in responses], sum(response.usage.completion_tokens for response in responses)


def ignored_settings(server: Server) -> list[str]:
    """The settings of a request that have no effect, found out by asking."""
    story = "Write a long story about a fox."
    plain = ask(server, story, temperature=0)

    def choices(reader: Reader) -> list[dict[str, Any]]:
        return [choice for chunk in reader.chunks() for choice in chunk.get("choices", [])]

    seeded = [ask(server, story, temperature=1.5, seed=7).text for _ in range(2)]
    works = {
        "max_tokens": len(ask(server, story, temperature=0, max_tokens=5).text) < len(plain.text) / 2,
        "max_completion_tokens": len(ask(server, story, temperature=0, max_tokens=None, max_completion_tokens=5).text)
        < len(plain.text) / 2,
        "temperature": seeded[0] != plain.text,
        "seed": seeded[0] == seeded[1] != plain.text,
        "top_p": ask(server, story, temperature=1.5, top_p=1e-6, seed=3).text == plain.text,
        "stop": "fox" not in ask(server, story, temperature=0, stop=["fox"]).text,
        "n": len({choice["index"] for choice in choices(ask(server, story, n=2, temperature=0))}) == 2,
        "logprobs": any(choice.get("logprobs") for choice in choices(ask(server, story, temperature=0, logprobs=True))),
        "stream_options": any(
            chunk.get("usage")
            for chunk in ask(server, story, temperature=0, stream=True, stream_options={"include_usage": True}).chunks()
        ),
    }
    return [name for name, effective in works.items() if not effective]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--servers", default="lmbridge,transformers,lock")
    parser.add_argument("--streams", default="32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--be-locked-view", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_locked_view:
        be_locked_view(arguments.be_locked_view)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(SERVERS[name]()) for name in arguments.servers.split(",")}
        for streams in map(int, arguments.streams.split(",")):
            prompts = make_prompts(streams)
            right, tokens = references(prompts)
            candidates = {
                name: functools.partial(crowd, server, prompts, right, tokens) for name, server in servers.items()
            }
            for candidate in candidates.values():  # the first requests load and warm up
                candidate()
            results = interleave(candidates, arguments.rounds)
            base = "transformers" if "transformers" in servers else next(iter(servers))
            print_table(f"Serving the bundled model to {streams} streams", results, base)
        print("\nSettings of a request without effect")
        for name, server in servers.items():
            try:
                print(f"{name}: {', '.join(ignored_settings(server)) or 'none'}", flush=True)
            except (ValueError, KeyError, TimeoutError) as error:
                print(f"{name}: could not be asked: {error!r}", flush=True)


if __name__ == "__main__":
    main()
