"""WSGI servers beside each other: what each costs for server-sent events, and what it does when clients leave or crowd.

Every server runs the same small Flask app in a process of its own; its views stream from a real Bridge over a scripted
engine, and once over the bundled model. The client is one loop over raw sockets in this process.

- paced: each stream gets a token every 10 ms; events a second, CPU microseconds of the server's processes for each,
  milliseconds to the first event (p50 and p99)
- full speed: an engine without pause, so that readers are behind and tokens merge; events a second
- model: the bundled model, 150 tokens for each stream; tokens a second
- leaving: clients go away while tokens flow (one every 10 ms), and while nothing does; milliseconds until the engine
  is told, at the worst
- crowd: with a stream on each of 64 threads, milliseconds until one more request is answered; inf: not in a second

Run: ``python -m tests.benchmarks.http_servers [--servers serve,waitress,…] [--streams 64] [--rounds 3]``
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from flask import Flask, Response, request

from lmbridge import Bridge
from lmbridge.flask import LMBridge
from lmbridge.testing import ScriptedEngine
from tests.benchmarks.measure import interleave, print_table

LIMIT = 20.0  # seconds for anything a client waits for
PATIENCE = 1.0  # seconds the extra request of the crowd may take
PROMPT = "Write a long story about a fox."
TOKEN = "~"  # one token of an answer, found nowhere else in what a server sends
MODEL_TOKENS = 150
PACE = 0.01  # seconds between the tokens of a paced stream
HEARTBEAT = 1.0  # seconds of silence before a comment is sent; who has no better way notices by it that nobody is there


# --- the app that every server runs ---


class WatchedEngine(ScriptedEngine):
    """Answers with tokens that are all alike, and knows when it was told to stop."""

    def __init__(self, step_time: float) -> None:
        super().__init__(lambda request: [TOKEN] * request.config.max_new_tokens, step_time=step_time)
        self.aborts: dict[str, float] = {}  # request id to the monotonic time, which all processes share

    def abort_request(self, request_id: str) -> None:
        self.aborts[request_id] = time.monotonic()
        super().abort_request(request_id)


def create_app() -> Flask:
    """``/stream?engine=paced&tokens=100&id=…``, ``/aborts`` and ``/ping``."""
    app = Flask(__name__)
    engines = {"paced": WatchedEngine(PACE), "fast": WatchedEngine(0.0), "silent": WatchedEngine(3600.0)}
    bridges = {name: Bridge(engine, timeout=120) for name, engine in engines.items()}
    app.config["LMBRIDGE_MODELS"] = {**bridges, "model": "demo"}
    app.config["LMBRIDGE_HEARTBEAT"] = HEARTBEAT
    lm = LMBridge(app)

    @app.get("/stream")
    def stream() -> Response:
        asked = request.args
        bridge = lm.bridge(asked["engine"])
        tokens = int(asked["tokens"])
        return lm.stream_response(bridge.stream(PROMPT, max_new_tokens=tokens, ignore_eos=True, request_id=asked["id"]))

    @app.get("/aborts")
    def aborts() -> dict[str, float]:
        return {name: at for engine in engines.values() for name, at in engine.aborts.items()}

    @app.get("/ping")
    def ping() -> dict[str, int]:
        return {"threads": threading.active_count()}

    return app


# --- the servers ---


def serve_werkzeug(port: int, threads: int) -> None:
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    make_server("127.0.0.1", port, create_app(), threaded=True).serve_forever()


def serve_waitress(port: int, threads: int) -> None:
    from waitress.server import create_server

    create_server(
        create_app(), host="127.0.0.1", port=port, threads=threads, channel_request_lookahead=1,
        connection_limit=1000, asyncore_use_poll=True,
    ).run()  # fmt: skip


def serve_ours(port: int, threads: int) -> None:
    from lmbridge.flask.http_server import HttpServer

    HttpServer(create_app(), "127.0.0.1", port, threads, 1 << 20).open()
    threading.Event().wait()


def serve_cheroot(port: int, threads: int) -> None:
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), create_app(), numthreads=threads, max=threads, request_queue_size=128).start()


def serve_gunicorn(port: int, threads: int) -> None:
    options = ["-k", "gthread", "-w", "1", "--threads", str(threads), "-b", f"127.0.0.1:{port}", "--log-level", "error"]
    _become("gunicorn", *options, "tests.benchmarks.http_servers:create_app()")


def serve_granian(port: int, threads: int) -> None:
    options = ["--interface", "wsgi", "--blocking-threads", str(threads), "--port", str(port), "--no-access-log"]
    _become("granian", *options, "--factory", "--log-level", "error", "tests.benchmarks.http_servers:create_app")


def _become(module: str, *arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


SERVERS: dict[str, Callable[[int, int], None]] = {
    "serve": serve_ours,  # as ``lmbridge serve`` has it
    "cheroot": serve_cheroot,
    "waitress": serve_waitress,
    "gunicorn": serve_gunicorn,
    "werkzeug": serve_werkzeug,
    "granian": serve_granian,
}


@contextlib.contextmanager
def running(name: str, threads: int) -> Iterator[Server]:
    """A server in a process of its own, ready to be asked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.benchmarks.http_servers", "--serve", name, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--threads", str(threads)], stdout=log, stderr=log)
        try:
            server = Server(name, port, psutil.Process(process.pid))
            server.wait_until_up()
            model_speed(server, 1)  # loads it
            yield server
        finally:
            for left in server.processes():
                left.kill()
            process.wait()


@dataclass
class Server:
    """A running server, as its client sees it."""

    name: str
    port: int
    process: psutil.Process

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        times = [process.cpu_times() for process in self.processes()]
        return float(sum(spent.user + spent.system for spent in times))

    def get(self, path: str, timeout: float = LIMIT) -> Any:
        """The JSON at ``path``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            return json.load(answer)

    def wait_until_up(self) -> None:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                self.get("/ping")
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} did not start")


# --- the client ---


class Reader:
    """One connection that has asked for ``path``; counts what comes."""

    def __init__(self, server: Server, path: str) -> None:
        self.began = time.monotonic()
        self.first: float | None = None
        self.ended: float | None = None
        self.events = self.tokens = 0
        self._tail = b""
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        self.socket.setblocking(False)

    def receive(self) -> None:
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return
        if not data:
            self.ended = time.monotonic()
            return
        self.tokens += data.count(TOKEN.encode())
        self.events += (self._tail + data).count(b"\n\n")
        self._tail = data[-1:] if not data.endswith(b"\n\n") else b""
        if self.first is None and self.tokens:
            self.first = time.monotonic()


def read_all(readers: list[Reader], enough: Callable[[], bool], timeout: float = LIMIT) -> None:
    """Read until every connection has ended or there is ``enough``."""
    end = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        while selector.get_map() and not enough():
            if time.monotonic() > end:
                raise TimeoutError("the server did not send what was waited for")
            for key, _ in selector.select(0.5):
                key.data.receive()
                if key.data.ended is not None:
                    selector.unregister(key.fileobj)
                    key.data.socket.close()


def open_streams(server: Server, engine: str, count: int, tokens: int) -> list[Reader]:
    stamp = time.monotonic_ns()
    return [Reader(server, f"/stream?engine={engine}&tokens={tokens}&id={stamp}-{n}") for n in range(count)]


# --- what is measured ---


@dataclass
class Figures:
    """One round of one server."""

    events_s: float
    cpu_us_event: float
    first_p50_ms: float
    first_p99_ms: float
    full_events_s: float
    model_tokens_s: float
    crowd_ms: float
    leave_flowing_ms: float
    leave_silent_ms: float
    threads: float


def paced(server: Server, streams: int) -> tuple[float, float, float, float]:
    cpu = server.cpu()
    readers = open_streams(server, "paced", streams, 200)
    read_all(readers, lambda: False)
    cpu = server.cpu() - cpu
    return _rate(readers, "events"), cpu / _sum(readers, "events") * 1e6, *_first(readers)


def full_speed(server: Server, streams: int) -> float:
    readers = open_streams(server, "fast", streams, 2000)
    read_all(readers, lambda: False)
    return _rate(readers, "events")


def model_speed(server: Server, streams: int) -> float:
    readers = open_streams(server, "model", streams, MODEL_TOKENS)
    read_all(readers, lambda: False)
    ended = max(reader.ended or 0.0 for reader in readers)
    return streams * MODEL_TOKENS / (ended - readers[0].began)


def leaving(server: Server, engine: str, count: int) -> float:
    """The longest of the times from a client's leaving until its request is aborted; inf when one is not."""
    stamp = time.monotonic_ns()
    names = [f"{stamp}-{n}" for n in range(count)]
    readers = [Reader(server, f"/stream?engine={engine}&tokens=100000&id={name}") for name in names]
    read_all(readers, lambda: all(reader.events for reader in readers))
    left = {}
    for name, reader in zip(names, readers, strict=True):
        left[name] = time.monotonic()
        reader.socket.close()
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        aborts = server.get("/aborts")
        if all(name in aborts for name in names):
            return max(float(aborts[name]) - left[name] for name in names) * 1e3
        time.sleep(0.05)
    return float("inf")


def crowd(server: Server, threads: int) -> float:
    """How long one more request takes beside as many streams as there are threads."""
    readers = open_streams(server, "paced", threads, 100_000)
    read_all(readers, lambda: all(reader.tokens for reader in readers))
    began = time.monotonic()
    try:
        server.get("/ping", PATIENCE)
        return (time.monotonic() - began) * 1e3
    except TimeoutError:
        return float("inf")
    finally:
        for reader in readers:
            reader.socket.close()


def _sum(readers: list[Reader], what: str) -> int:
    return sum(getattr(reader, what) for reader in readers)


def _rate(readers: list[Reader], what: str) -> float:
    ended = max(reader.ended or 0.0 for reader in readers)
    return _sum(readers, what) / (ended - min(reader.began for reader in readers))


def _first(readers: list[Reader]) -> tuple[float, float]:
    times = sorted((reader.first or LIMIT) - reader.began for reader in readers)
    return statistics.median(times) * 1e3, times[int(len(times) * 0.99)] * 1e3


def measure(server: Server, streams: int, threads: int) -> Figures:
    return Figures(
        *paced(server, streams),
        full_speed(server, streams),
        model_speed(server, streams),
        crowd(server, threads),
        leaving(server, "paced", 16),
        leaving(server, "silent", 16),
        server.get("/ping")["threads"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)  # be that server, on --port
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        SERVERS[arguments.serve](arguments.port, arguments.threads)
        return
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in arguments.servers.split(","):
            if name == "serve" or importlib.util.find_spec(name):
                servers[name] = stack.enter_context(running(name, arguments.threads))
            else:
                print(f"{name} is left out: it is not installed")

        def candidate(server: Server) -> Callable[[], Figures]:
            return lambda: measure(server, arguments.streams, arguments.threads)

        results = interleave({name: candidate(server) for name, server in servers.items()}, arguments.rounds)
    print_table(f"WSGI servers, {arguments.streams} streams", results, next(iter(results)))


if __name__ == "__main__":
    main()
