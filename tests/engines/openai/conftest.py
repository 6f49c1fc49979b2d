"""Servers that the engine asks over real HTTP: lmbridge's own on scripted engines, and sockets that misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.flask.http_server import HttpServer
from lmbridge.flask.serving import create_app
from lmbridge.testing import ScriptedEngine

PATIENCE = 30.0  # seconds after which a test is taken to hang


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys or addresses of the machine's own."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Far:
    """``lmbridge serve`` within this process, with a scripted engine."""

    engine: ScriptedEngine
    bridge: Bridge
    server: HttpServer

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"


@contextlib.contextmanager
def far_end(
    engine: ScriptedEngine, name: str = "far", port: int = 0, beside: Mapping[str, Bridge] | None = None, **config: Any
) -> Iterator[Far]:
    """Serve an engine as ``lmbridge serve`` does, beside others; ``config`` is without the LMBRIDGE_ of its keys."""
    with Bridge(
        engine, when_full=config.pop("when_full", "block"), max_pending=config.pop("max_pending", 1024)
    ) as bridge:
        keys = {f"LMBRIDGE_{key.upper()}": value for key, value in config.items()}
        server = HttpServer(
            create_app({"LMBRIDGE_MODELS": {name: bridge, **(beside or {})}, **keys}, page=False),
            "127.0.0.1",
            port,
            40,
            1 << 20,
        )
        server.open()
        try:
            yield Far(engine, bridge, server)
        finally:
            server.close()
            bridge.close()  # what a test has left running is aborted


@pytest.fixture
def serve() -> Iterator[Callable[..., Far]]:
    """Serves scripted engines until the test is through."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(far_end(*arguments, **options))


MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}


def http(status: int, body: object, **headers: str) -> bytes:
    """A whole response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def events(*chunks: object) -> bytes:
    """The beginning of a stream, its length left open."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    said = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return head + "".join(f"data: {each}\n\n" for each in said).encode()


def chunk(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One of a chat's."""
    return {"choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": reason}]}


def answer(text: str) -> bytes:
    """A whole stream."""
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    return events(chunk(text), chunk("", "stop"), usage, "[DONE]")


@dataclass
class Rude:
    """A server of raw sockets: each POST gets the next of ``says``, the last one for ever; None leaves it waiting.

    Attributes:
        models: the response to what is no POST; None leaves it waiting.
        asked: the bodies of the POSTs so far.
        gone: is set when a client has closed the connection of a POST that waits.
    """

    says: list[bytes | None]
    models: bytes | None = field(default_factory=lambda: http(200, MODELS))
    asked: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while (asked := _read(connection)) is not None:
                head, body = asked
                if not head.startswith("POST"):
                    response = self.models
                else:
                    self.heads.append(head)
                    self.asked.append(json.loads(body))
                    response = self.says.pop(0) if len(self.says) > 1 else self.says[0]
                if response is not None:
                    connection.sendall(response)
                    if b"Content-Length" in response:
                        continue
                    if b"[DONE]" in response or not response.endswith(b"\n\n"):
                        return
                if not connection.recv(1):
                    self.gone.set()
                return


def _read(connection: socket.socket) -> tuple[str, bytes] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    text = head.decode()
    length = next(
        (int(line.split(":")[1]) for line in text.lower().split("\r\n") if line.startswith("content-length")), 0
    )
    while len(body) < length:
        body += connection.recv(65536)
    return text, body


@contextlib.contextmanager
def rude_server(*says: bytes | None, port: int = 0, **more: Any) -> Iterator[Rude]:
    listener = socket.create_server(("127.0.0.1", port))
    rude = Rude(list(says), **more)
    rude.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    thread = threading.Thread(target=rude.serve, args=(listener,))
    thread.start()
    try:
        yield rude
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE)


@pytest.fixture
def rude() -> Iterator[Callable[..., Rude]]:
    """Serves by raw sockets until the test is through."""
    with ExitStack() as stack:
        yield lambda *says, **options: stack.enter_context(rude_server(*says, **options))
