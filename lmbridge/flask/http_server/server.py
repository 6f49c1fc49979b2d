"""Starts and stops the server.

Rule: ``HttpServer`` is used by its owner; ``_run`` is the thread that reads all connections.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from lmbridge.flask.http_server.connections import CONNECTIONS, HEAD_LIMIT, Listener
from lmbridge.flask.http_server.library import Adjustments

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("lmbridge.http")

BACKLOG = 1024  # connections that may wait to be accepted
SEND_BUFFER = 128 * 1024  # bytes buffered by the kernel per response: more would hide a slow reader's progress
LOOK = 1.0  # seconds between checks of the connections, and of threads that others wait for
STOP_GRACE = 2.0  # seconds for threads to end at shutdown


class HttpServer:
    """Serves a WSGI app on its own threads.

    Args:
        app: the app.
        host, port: the address to listen on; port 0 picks a free one.
        threads: most requests at once.
        max_body: most bytes in a request body; a larger one is refused before the app sees it, and not stored.
    """

    def __init__(self, app: WSGIApplication, host: str, port: int, threads: int, max_body: int) -> None:
        self.bind_addr = (host, port)
        self._app, self._threads, self._max_body = app, threads, max_body
        self._pause = threading.Event()  # never set
        self._listener: Listener | None = None
        self._closing = self._ended = False

    @property
    def closing(self) -> bool:
        """Set it to close each connection after its next response."""
        return self._closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        self._closing = closing
        if self._listener is not None:
            self._listener.closing = closing

    @property
    def url(self) -> str:
        host, port = self.bind_addr
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"

    def open(self) -> None:
        """Bind the address and start serving.

        Raises:
            OSError: the address cannot be bound.
        """
        bound: Future[None] = Future()
        # All its threads are started by this one and are daemons too: a client that reads slowly must not keep the
        # process from exiting.
        thread = threading.Thread(target=self._run, args=(bound,), name="lmbridge http", daemon=True)
        thread.start()
        while not bound.done() and thread.is_alive():
            concurrent.futures.wait([bound], LOOK)
        bound.result(0)
        self._thread = thread

    def wait_until_sent(self, timeout: float) -> bool:
        """Wait until all responses are sent; return False after ``timeout`` seconds."""
        end, listener = time.monotonic() + timeout, self._listener
        while listener is not None and listener.is_sending():
            if time.monotonic() >= end:
                return False
            self._pause.wait(min(0.05, timeout))
        return True

    def close(self) -> None:
        """Accept no more connections, and give running responses a moment to finish."""
        self._ended = True
        listener = self._listener
        if listener is None:
            return
        self._on_loop(listener.stop_listening)
        listener.task_dispatcher.shutdown(timeout=STOP_GRACE)
        self._on_loop(listener.hang_up)
        self._thread.join(STOP_GRACE)

    # --- on the reading thread ---

    def _run(self, bound: Future[None]) -> None:
        try:
            self._listener = listener = self._bind()
        except BaseException as error:
            bound.set_exception(error)
            return
        bound.set_result(None)
        while not self._ended:
            try:
                listener.run()
            except BaseException:
                logger.exception("Reading connections failed; trying again.")

    def _bind(self) -> Listener:
        host, port = self.bind_addr
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.bind_addr = (host, listening.getsockname()[1])
        settings = Adjustments(
            sockets=[listening], threads=self._threads, ident="lmbridge", server_name=host, backlog=BACKLOG,
            connection_limit=2 * CONNECTIONS, cleanup_interval=LOOK, asyncore_use_poll=True, log_socket_errors=False,
            max_request_header_size=HEAD_LIMIT, max_request_body_size=self._max_body + 1,
            clear_untrusted_proxy_headers=False,
        )  # fmt: skip
        settings.socket_options = [*settings.socket_options, (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)]
        where = (listening.family, listening.type, listening.proto, listening.getsockname())
        listener = Listener(self._app, _sock=listening, bind_socket=False, sockinfo=where, adj=settings)
        listener.closing = self._closing
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # busy threads are nothing to warn about
        return listener

    def _on_loop(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # the loop has ended
            self._listener.trigger.pull_trigger(work)  # type: ignore[union-attr]
