"""The WSGI server of ``lmbridge serve``: waitress, with what an open port and answers that take minutes need.

Rule: HTTP and threads only; nothing of models and Flask is known here. One thread, "lmbridge http", reads all
connections; a request is given to a thread of the pool once all of it has come, so that whoever sends slowly, or
nothing, holds none.

What is derived from below, and what of it is overridden, waitress does not document: setup.cfg bounds its version.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lmbridge.errors import MissingDependencyError

try:
    from waitress import receiver
    from waitress.adjustments import Adjustments
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.server import TcpWSGIServer
    from waitress.task import ErrorTask, WSGITask
except ImportError as error:
    raise MissingDependencyError("lmbridge serve needs: pip install 'waitress >= 3.0.1, < 3.1'") from error

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("lmbridge.http")

BACKLOG = 1024  # connections that may wait to be accepted
CONNECTIONS = 1000  # open at once; beyond, whoever has sent no whole request for the longest makes room
GRACE = 1.0  # seconds in which whoever has just connected, or begun to send, need not make room
FILES = 3  # that a connection may take: its socket, and a large body and answer
OTHER_FILES = 100  # that the process may want to open
HEAD_LIMIT = 64 * 1024  # bytes
HEAD_TIME = 10.0  # seconds for the head of a request, from its first byte
BODY_TIME = 60.0  # seconds for all of it
IDLE_TIME = 30.0  # seconds that a connection is kept open without a request
READ_TIME = 30.0  # seconds in which a client must take something of its answer; it then counts as gone
SEND_BUFFER = 128 * 1024  # bytes that the kernel keeps of an answer: of more, a slow reader's progress would not show
LINGER_TIME = 2.0  # seconds in which what a client still sends is thrown away, so that it reads why it was refused
LINGER_BYTES = 64 * 1024 * 1024  # that are thrown away so
LOOK = 1.0  # seconds between two looks at the connections, and at threads that others wait for
STOP_GRACE = 2.0  # seconds for threads to come home at the end

_FIRST_LINE = re.compile(rb"[A-Z]{1,20} [^ ]+ HTTP/1\.[01]")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# A line of a chunk's size that ends in a line feed of its own is one to waitress; some proxies take it for two.
receiver.ONLY_HEXDIG_RE = re.compile(rb"[0-9a-fA-F]{1,16}\Z")  # type: ignore[attr-defined]
receiver.CHUNK_EXT_RE = re.compile(receiver.CHUNK_EXT_RE.pattern.removesuffix(b"$") + rb"\Z")  # type: ignore[attr-defined]


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
        self._pause = threading.Event()  # never set
        self._listener: _Listener | None = None
        self._closing = self._ended = False

    @property
    def closing(self) -> bool:
        """Set it to have each connection closed after its next response."""
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

    def wait_until_sent(self, timeout: float) -> bool:
        """Whether all answers have gone out within ``timeout`` seconds."""
        end, listener = time.monotonic() + timeout, self._listener
        while listener is not None and listener.is_sending():
            if time.monotonic() >= end:
                return False
            self._pause.wait(min(0.05, timeout))
        return True

    def close(self) -> None:
        """Take no more connections, and give running responses a moment."""
        self._ended = True
        listener = self._listener
        if listener is None:
            return
        self._on_loop(listener.stop_listening)
        listener.task_dispatcher.shutdown(timeout=STOP_GRACE)
        self._on_loop(listener.hang_up)
        self._thread.join(STOP_GRACE)

    # --- the thread that reads ---

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
                logger.exception("The look at the connections failed; it goes on.")

    def _bind(self) -> _Listener:
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
        listener = _Listener(self._app, _sock=listening, bind_socket=False, sockinfo=where, adj=settings)
        listener.closing = self._closing
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that all threads are taken is nothing to warn of
        return listener

    def _on_loop(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._listener.trigger.pull_trigger(work)  # type: ignore[union-attr]


class _Request(HTTPRequestParser):
    """One request as it comes in. What two servers could read in two ways is refused (RFC 9112)."""

    def parse_header(self, header_plus: bytes) -> None:
        first, *lines = header_plus.split(b"\r\n")
        if not _FIRST_LINE.fullmatch(first):
            raise ParsingError("The request line is invalid")
        head = {name: values for name, values in _values(lines).items() if name in _ONCE}
        for name, values in head.items():
            if len(values) > 1:
                raise ParsingError(f"More than one {name.decode()} header")
        _check_length(head, first.endswith(b"1.1"))
        # waitress's own expressions take minutes for a line of many spaces
        kept = [name + colon + value.strip(b" \t") for name, colon, value in (line.partition(b":") for line in lines)]
        try:
            super().parse_header(b"\r\n".join([first, *kept]))
        except ValueError as cause:
            raise ParsingError("The request is invalid") from cause


_ONCE = (b"content-length", b"transfer-encoding", b"host")


def _values(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    """Each header's values by its name in lower case."""
    found: dict[bytes, list[bytes]] = {}
    for line in lines:
        if line.startswith((b" ", b"\t")):
            raise ParsingError("A header of several lines")
        name, _, value = line.partition(b":")
        found.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return found


def _check_length(head: dict[bytes, list[bytes]], newer: bool) -> None:
    """Raise ParsingError unless it is clear where the request ends, and for whom it is."""
    if b"transfer-encoding" in head:
        if b"content-length" in head:
            raise ParsingError("Both content-length and transfer-encoding")
        if not newer:
            raise ParsingError("Transfer-encoding is of HTTP/1.1")
        if head[b"transfer-encoding"][0].lower() != b"chunked":
            raise ParsingError("Of transfer encodings there is chunked only")
    if newer and b"host" not in head:
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
        environ.pop("waitress.client_disconnected", None)  # the socket itself tells sooner, and costs less
        environ["lmbridge.socket"] = self.channel.socket  # ``disconnect`` watches it, and leaves word for our own close
        environ["lmbridge.closed_here"] = self.channel.closed_here
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
        closed_here: called when the connection is closed by this side.
    """

    server: Any
    request: Any
    socket: Any

    parser_class = _Request
    task_class = _Answer
    error_task_class = _Refusal
    lingers = False
    _begun = 0.0  # when the first byte of the present request came
    _answered = 0.0  # when the last answer had been made
    _lingers_until: float | None = None
    _thrown_away = 0  # bytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.closed_here: list[Callable[[], None]] = []  # appended to and taken from by any thread, in atomic steps
        super().__init__(*args, **kwargs)

    # --- time ---

    def since(self) -> float:
        """When the client last had nothing to do but to send."""
        return self.last_activity if self.request is None else max(self._begun, self._answered)

    def is_overdue(self, now: float) -> bool:
        """Whether the client takes too long, with whatever it is at."""
        if self._lingers_until is not None:
            return now > self._lingers_until
        if self.requests or self.total_outbufs_len:
            return bool(self.total_outbufs_len) and now - self.last_activity > READ_TIME
        if self.request is None:
            return now - self.since() > IDLE_TIME
        return now - self.since() > (BODY_TIME if self.request.headers_finished else HEAD_TIME)

    def service(self) -> None:
        super().service()
        self._answered = time.time()

    def write_soon(self, data: Any) -> int:
        if not self.total_outbufs_len:  # nothing waited for the client, whenever something last did
            self.last_activity = time.time()
        written: int = super().write_soon(data)
        return written

    # --- what the loop asks and does ---

    def readable(self) -> bool:
        if self.socket is None:  # closed a moment ago, in the same look at all
            return False
        return self._lingers_until is not None or bool(super().readable())

    def writable(self) -> bool:
        return self.socket is not None and bool(super().writable())

    def received(self, data: bytes) -> bool:
        before = self.request
        taken: bool = super().received(data)
        if self.request is not before:
            self._begun = time.time()
        chunks = self.request.body_rcv if self.request is not None else None
        if len(getattr(chunks, "trailer", b"")) + len(getattr(chunks, "control_line", b"")) > HEAD_LIMIT:
            self.handle_close()
        return taken

    def send_continue(self) -> None:
        """With requests_lock held, by any thread; the loop's sends it. Of a request that has come whole, or was
        refused, nothing more is wanted.
        """
        self.request.expect_continue = False
        if self.request.completed:
            return
        with self.outbuf_lock:
            self.outbufs[-1].append(_CONTINUE)
            self.current_outbuf_count += len(_CONTINUE)
            self.total_outbufs_len += len(_CONTINUE)
            self.sent_continue = True

    def handle_read(self) -> None:
        if self._lingers_until is None:
            before = self.last_activity
            super().handle_read()
            self.last_activity = max(before, self._answered)  # that something comes is no activity: empty lines may
            return
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
                self.socket.shutdown(socket.SHUT_WR)

    def handle_close(self) -> None:
        super().handle_close()
        for tell in list(self.closed_here):
            tell()

    def handle_expt(self) -> None:
        """A byte out of band, which HTTP does not know."""
        self.handle_close()


def _room() -> int:
    """For how many connections there is room."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, (files - OTHER_FILES) // FILES))


class _Listener(TcpWSGIServer):
    """The socket that listens, and all connections of it.

    Attributes:
        closing: each connection is closed after its next response.
    """

    channel_class = _Channel
    closing = False
    active_channels: Any
    trigger: Any
    task_dispatcher: Any
    socket: Any

    def maintenance(self, now: float) -> None:
        """Close the connections of those who take too long, and of some where there are too many."""
        for channel in list(self.active_channels.values()):
            if channel.is_overdue(now):
                channel.handle_close()

    def handle_accept(self) -> None:
        if len(self.active_channels) >= _room():
            late = time.time() - GRACE
            waiting = [each for each in self.active_channels.values() if not each.requests and each.since() <= late]
            if waiting:
                min(waiting, key=_Channel.since).handle_close()
        super().handle_accept()

    def handle_error(self) -> None:
        """What failed was one connection's matter."""
        logger.exception("A connection could not be taken.")

    def is_sending(self) -> bool:
        """Whether answers are made, or wait for their clients. Any thread."""
        return any(channel.requests or channel.total_outbufs_len for channel in list(self.active_channels.values()))

    def stop_listening(self) -> None:
        self.accepting = False
        self.socket.close()
        self.del_channel()

    def hang_up(self) -> None:
        for channel in list(self.active_channels.values()):
            channel.handle_close()
        self.trigger.close()
