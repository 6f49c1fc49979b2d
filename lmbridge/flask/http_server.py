"""The WSGI server of ``lmbridge serve``: waitress, with what an open port and answers that take minutes need.

Rule: HTTP and threads only; nothing of models and Flask is known here. One thread, "lmbridge http", reads all
connections; a request is given to a thread of the pool once all of it has come, so that whoever sends slowly, or
nothing, holds none. What waitress does not document, and is leant on here, is bounded in setup.cfg:
``create_server``, a server's ``active_channels``, ``channel_class``, ``maintenance``, ``run`` and ``trigger``, and the
classes that are derived from below, with their names.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import resource
import socket
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lmbridge.errors import MissingDependencyError

try:
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.server import create_server
    from waitress.task import ErrorTask, WSGITask
except ImportError as error:
    raise MissingDependencyError("lmbridge serve needs: pip install 'waitress >= 3.0.1, < 3.1'") from error

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("lmbridge.http")

BACKLOG = 1024  # connections that may wait to be accepted
CONNECTIONS = 1000  # open at once; beyond, whoever has sent no whole request for the longest makes room
OTHER_FILES = 200  # that the process may want to open
HEAD_LIMIT = 64 * 1024  # bytes
HEAD_TIME = 10.0  # seconds for the head of a request, from its first byte
BODY_TIME = 60.0  # seconds for all of it
IDLE_TIME = 30.0  # seconds that a connection is kept open without a request
READ_TIME = 30.0  # seconds in which a client must take something of its answer; it then counts as gone
LINGER_TIME = 2.0  # seconds in which what a client still sends is thrown away, so that it reads why it was refused
LINGER_BYTES = 64 * 1024 * 1024  # that are thrown away so
LOOK = 1.0  # seconds between two looks at the connections, and at threads that others wait for
STOP_GRACE = 2.0  # seconds for threads to come home at the end


class HttpServer:
    """Serves ``app`` on threads of its own.

    Args:
        app: what is served.
        host, port: where; port 0 takes a free one.
        threads: requests at once.
        max_body: bytes of a request's body; more is refused before the app hears of it, and never kept.
    """

    def __init__(self, app: WSGIApplication, host: str, port: int, threads: int, max_body: int) -> None:
        self.bind_addr = (host, port)
        self._app, self._threads, self._max_body = app, threads, max_body
        self._server: Any = None
        self._closing = self._ended = False

    @property
    def closing(self) -> bool:
        """Set it to have each connection closed after its next response."""
        return self._closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        self._closing = closing
        if self._server is not None:
            self._server.closing = closing

    @property
    def url(self) -> str:
        host, port = self.bind_addr
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"

    def open(self) -> None:
        """Bind, and serve from now on.

        Raises:
            OSError: the address cannot be bound.
        """
        bound: Future[None] = Future()
        # All its threads are children of this one and daemons like it: a client that reads slowly must not hold the
        # process at its end.
        thread = threading.Thread(target=self._run, args=(bound,), name="lmbridge http", daemon=True)
        thread.start()
        while not bound.done() and thread.is_alive():
            concurrent.futures.wait([bound], LOOK)
        bound.result(0)
        self._thread = thread

    def close(self) -> None:
        """Take no more connections, and give running responses a moment."""
        self._ended = True
        if self._server is None:
            return
        self._on_loop(self._stop_listening)
        self._server.task_dispatcher.shutdown(timeout=STOP_GRACE)
        self._on_loop(self._hang_up)
        self._thread.join(STOP_GRACE)

    # --- the thread that reads ---

    def _run(self, bound: Future[None]) -> None:
        try:
            self._server = self._bind()
        except BaseException as error:
            bound.set_exception(error)
            return
        bound.set_result(None)
        while not self._ended:
            try:
                self._server.run()
            except BaseException:
                logger.exception("The look at the connections failed; it goes on.")

    def _bind(self) -> Any:
        host, port = self.bind_addr
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.bind_addr = (host, listening.getsockname()[1])
        server: Any = create_server(
            self._app, sockets=[listening], threads=self._threads, ident="lmbridge", server_name=host, backlog=BACKLOG,
            connection_limit=2 * CONNECTIONS, cleanup_interval=LOOK, asyncore_use_poll=True, log_socket_errors=False,
            max_request_header_size=HEAD_LIMIT, max_request_body_size=self._max_body + 1,
            clear_untrusted_proxy_headers=False,
        )  # fmt: skip
        server.channel_class = _Channel
        server.maintenance = self._look_after
        server.closing = self._closing
        server.room = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that all threads are taken is nothing to warn of
        return server

    def _look_after(self, now: float) -> None:
        """Close the connections of those who take too long."""
        for channel in list(self._server.active_channels.values()):
            if channel.is_overdue(now):
                channel.handle_close()

    def _on_loop(self, work: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._server.trigger.pull_trigger(work)

    def _stop_listening(self) -> None:
        self._server.accepting = False
        self._server.socket.close()
        self._server.del_channel()

    def _hang_up(self) -> None:
        for channel in list(self._server.active_channels.values()):
            channel.handle_close()
        self._server.trigger.close()


class _Request(HTTPRequestParser):
    """One request as it comes in. What two servers could read in two ways is refused (RFC 9112)."""

    def parse_header(self, header_plus: bytes) -> None:
        lines = header_plus.split(b"\r\n")[1:]
        names = [line.partition(b":")[0].lower() for line in lines]
        if any(line.startswith((b" ", b"\t")) for line in lines):
            raise ParsingError("A header of several lines")
        for name in (b"content-length", b"transfer-encoding", b"host"):
            if names.count(name) > 1:
                raise ParsingError(f"More than one {name.decode()} header")
        chunked = b"transfer-encoding" in names
        if chunked and b"content-length" in names:
            raise ParsingError("Both content-length and transfer-encoding")
        super().parse_header(header_plus)
        if chunked and self.version != "1.1":
            raise ParsingError("Transfer-encoding is of HTTP/1.1")
        if self.version == "1.1" and b"host" not in names:
            raise ParsingError("The host header is missing")


class _Refusal(ErrorTask):
    """What is answered to a request that never reaches the app: an error in the form of OpenAI's."""

    channel: Any
    request: Any
    response_headers: Any

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}."
        if error.code == 413:
            most = self.channel.adj.max_request_body_size - 1
            message = f"The request's body has more than the {most:,} bytes that are allowed."
        kind = "invalid_request_error" if error.code < 500 else "server_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.channel.lingers = True
        self.write(body)


class _Answer(WSGITask):
    """One request on its way through the app, on a thread of the pool."""

    channel: Any
    request: Any

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ.pop("waitress.client_disconnected", None)
        environ["lmbridge.socket"] = self.channel.socket  # ``disconnect`` watches it
        return environ

    def execute(self) -> None:
        try:
            super().execute()
        except Exception:
            raise
        except BaseException as error:  # waitress would leave the connection to itself
            raise RuntimeError(f"The app raised {error!r}, which ends this response only.") from error

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"The parts of a response must be bytes, not {type(data).__name__}.")
        super().write(data)

    def build_response_header(self) -> bytes:
        if self.channel.server.closing:
            self.request.headers["CONNECTION"] = "close"
        head: bytes = super().build_response_header()
        return head


class _Channel(HTTPChannel):
    """One connection; what is not about writing a response happens on the thread that reads.

    Attributes:
        lingers: what comes after the response is thrown away for a while: closed with something unread, a connection
            is reset, and the client may never see why.
    """

    parser_class = _Request
    task_class = _Answer
    error_task_class = _Refusal
    lingers = False
    _begun = 0.0  # when the first byte of the present request came
    _lingers_until: float | None = None
    _thrown_away = 0  # bytes

    def add_channel(self, map: Any = None) -> None:
        super().add_channel(map)
        server: Any = self.server
        others: dict[int, _Channel] = server.active_channels
        if len(others) > server.room:
            waiting = [channel for channel in others.values() if channel is not self and not channel.requests]
            if waiting:
                min(waiting, key=_Channel.since).handle_close()

    def since(self) -> float:
        """When it last had nothing to wait for."""
        return self._begun if self.request is not None else self.last_activity

    def is_overdue(self, now: float) -> bool:
        """Whether the client takes too long, with whatever it is at."""
        if self._lingers_until is not None:
            return now > self._lingers_until
        if self.requests or self.total_outbufs_len:
            return bool(self.total_outbufs_len) and now - self.last_activity > READ_TIME
        if self.request is None:
            return now - self.last_activity > IDLE_TIME
        return now - self._begun > (BODY_TIME if self.request.headers_finished else HEAD_TIME)

    def received(self, data: bytes) -> bool:
        before = self.request
        taken: bool = super().received(data)
        if self.request is not before:
            self._begun = time.time()
        return taken

    def readable(self) -> bool:
        return self._lingers_until is not None or bool(super().readable())

    def handle_read(self) -> None:
        if self._lingers_until is None:
            super().handle_read()
        else:
            self._thrown_away += len(self.recv(self.adj.recv_bytes))  # which closes where there is no more
            if self._thrown_away > LINGER_BYTES:
                self.handle_close()

    def handle_write(self) -> None:
        last = self.lingers and self.close_when_flushed
        if last:  # or it would be closed with its last byte
            self.close_when_flushed = False
        super().handle_write()
        if last and self.total_outbufs_len:
            self.close_when_flushed = True
        elif last and self.connected:
            self._lingers_until = time.time() + LINGER_TIME
            with contextlib.suppress(OSError):
                connected: Any = self.socket
                connected.shutdown(socket.SHUT_WR)
