"""The WSGI server of ``lmbridge serve``: cheroot, with what answers that take minutes need.

Rule: HTTP and threads only; nothing of models and Flask is known here. Other servers cost about the same (``python -m
tests.benchmarks.http_servers``) and are as good under one's own app; this one runs inside the process that has the
model, lets an app answer while it ends, and shows its sockets.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lmbridge.errors import MissingDependencyError

try:
    from cheroot import wsgi
    from cheroot.makefile import MakeFile
    from cheroot.server import HTTPConnection, HTTPRequest
except ImportError as error:
    raise MissingDependencyError("lmbridge serve needs: pip install cheroot") from error

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("lmbridge.http")

BACKLOG = 1024  # connections that may wait to be accepted
IDLE_CONNECTIONS = 1000  # kept open for their next request
SOCKET_TIMEOUT = 30  # seconds in which a client must read or send something; it then counts as gone
HEADER_LIMIT = 64 * 1024  # bytes
LOOK = 1.0  # seconds between two looks at a thread that others wait for
STOP_GRACE = 2  # seconds for threads to come home at the end


class HttpServer(wsgi.Server):
    """Serves ``app`` on threads of its own.

    Args:
        app: what is served.
        host, port: where; port 0 takes a free one.
        threads: requests at once.
        unread_limit: bytes of a request's body that are read on when the app has answered without reading them; a
            connection with more is closed.

    Attributes:
        closing: set it to have each connection closed after its next response.
    """

    def __init__(self, app: WSGIApplication, host: str, port: int, threads: int, unread_limit: int) -> None:
        super().__init__(
            (host, port), app, numthreads=threads, max=threads, server_name="lmbridge",
            request_queue_size=BACKLOG, timeout=SOCKET_TIMEOUT, shutdown_timeout=STOP_GRACE,
        )  # fmt: skip
        self.gateway = _Gateway
        self.ConnectionClass = _Connection
        self.keep_alive_conn_limit = IDLE_CONNECTIONS
        self.max_request_header_size = HEADER_LIMIT
        self.unread_limit = unread_limit
        self.closing = False

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

    def close(self) -> None:
        """Take no more connections, and give running responses a moment."""
        stopping = threading.Thread(target=self.stop, name="lmbridge http stop", daemon=True)
        stopping.start()
        stopping.join(2 * STOP_GRACE)

    @property
    def url(self) -> str:
        host, port = self.bind_addr
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"

    def _run(self, bound: Future[None]) -> None:
        try:
            self.prepare()
        except BaseException as error:
            bound.set_exception(error)
            return
        bound.set_result(None)
        self.serve()

    # --- what cheroot calls ---

    def process_conn(self, conn: HTTPConnection) -> None:
        """Give a connection to a thread once it has sent something; cheroot itself would at once."""
        if conn.last_used is None:
            self.put_conn(conn)
        else:
            super().process_conn(conn)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        logger.log(level, "%s", msg, exc_info=traceback)


class _Connection(HTTPConnection):
    """A connection that is written to with one system call a write."""

    def __init__(self, server: Any, sock: socket.socket, makefile: Any = MakeFile) -> None:
        super().__init__(server, sock, makefile)
        self.wfile = _Writer(sock)


class _Writer:
    """What cheroot writes responses to.

    A socket with a timeout is polled before each send, and each of the two calls gives the GIL away: with many streams
    beside an engine that is twice as many waits for it. Here the kernel is asked to take the bytes at once, and only
    when it cannot is there a wait.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.bytes_written = 0
        self._socket = sock

    def write(self, data: bytes) -> int:
        try:
            sent = os.write(self._socket.fileno(), data)  # asked each time: a number kept may be somebody else's by now
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._socket.sendall(data[sent:])
        self.bytes_written += len(data)
        return len(data)


class _Gateway(wsgi.Gateway_10):
    """One request on its way into the app and back."""

    def __init__(self, req: HTTPRequest) -> None:
        super().__init__(req)
        self.env["lmbridge.socket"] = req.conn.socket  # ``disconnect`` watches it

    def respond(self) -> None:
        """Run the app, and send what it answers.

        cheroot's own sends the head of a response that has failed already, so that what should be a 500 is an empty
        200; it does not close a response when that fails; and it ends the server where an app calls ``sys.exit``.
        """
        try:
            response = self.req.server.wsgi_app(self.env, self.start_response)
            try:
                for part in response:
                    if not isinstance(part, bytes):
                        raise TypeError(f"The parts of a response must be bytes, not {type(part).__name__}.")
                    if part:
                        self.write(part)
            finally:
                if hasattr(response, "close"):
                    response.close()
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"The app raised {error!r}, which ends this response only.") from error

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
        # cheroot reads on what the app left of a body, all of it into memory; and of one in chunks it reads nothing,
        # and would take the rest for the next request.
        left = getattr(self.req.rfile, "remaining", 0)
        if self.req.server.closing or left > self.req.server.unread_limit or self.req.chunked_read:
            self.req.close_connection = True
        write: Callable[..., Any] = super().start_response(status, headers, exc_info)
        return write
