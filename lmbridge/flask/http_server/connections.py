"""Connections and the listening socket: limits the time and resources of each client.

Rule: runs on the thread that reads all connections, except ``service`` and ``write_soon``, which run on the pool's.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

from lmbridge.flask.http_server.answers import Answer, Refusal
from lmbridge.flask.http_server.heads import Request
from lmbridge.flask.http_server.library import HTTPChannel, TcpWSGIServer

logger = logging.getLogger("lmbridge.http")

CONNECTIONS = 1000  # open at once; beyond, close the one that has gone longest without sending a complete request
GRACE = 1.0  # seconds for which a client that has just connected or begun to send is not closed for that
FILES = 3  # file descriptors per connection: its socket, a large body and a large response
OTHER_FILES = 100  # file descriptors for the rest of the process
HEAD_LIMIT = 64 * 1024  # bytes
HEAD_TIME = 10.0  # seconds for the head of a request, from its first byte
BODY_TIME = 60.0  # seconds for the whole request
IDLE_TIME = 30.0  # seconds for which a connection stays open without a request
READ_TIME = 30.0  # seconds within which a client must read some of its response, or it counts as disconnected
LINGER_TIME = 2.0  # seconds for discarding what a refused client still sends, so that it reads the response
LINGER_BYTES = 64 * 1024 * 1024  # bytes discarded at most

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Channel(HTTPChannel):
    """One connection.

    Attributes:
        lingers: after the response, discard input for a while: closing a connection with unread input resets it, and
            the client may never see the response.
        closed_here: functions to call when this side closes the connection.
    """

    server: Any
    request: Any
    socket: Any

    parser_class = Request
    task_class = Answer
    error_task_class = Refusal
    lingers = False
    _begun = 0.0  # when the first byte of the current request arrived
    _answered = 0.0  # when the last response was complete
    _lingers_until: float | None = None
    _thrown_away = 0  # bytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.closed_here: list[Callable[[], None]] = []  # appended to and taken from by any thread, in atomic steps
        super().__init__(*args, **kwargs)

    # --- time ---

    def since(self) -> float:
        """Since when the server has been waiting for the client to send."""
        return self.last_activity if self.request is None else max(self._begun, self._answered)

    def is_overdue(self, now: float) -> bool:
        """Whether the client is taking too long to send or to read."""
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
        if not self.total_outbufs_len:  # nothing was waiting for the client to read
            self.last_activity = time.time()
        written: int = super().write_soon(data)
        return written

    # --- called by the loop ---

    def readable(self) -> bool:
        if self.socket is None:  # closed in the same pass of the loop
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
        """Queue ``100 Continue``, unless the request is complete or refused. Any thread, with requests_lock held."""
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
            self.last_activity = max(before, self._answered)  # input alone is not activity: it may be empty lines
            return
        self._thrown_away += len(self.recv(self.adj.recv_bytes))  # closes at the end of input
        if self._thrown_away > LINGER_BYTES:
            self.handle_close()

    def handle_write(self) -> None:
        if self.socket is None:  # closed while reading
            return
        last = self.lingers and self.close_when_flushed
        if last:  # otherwise the last byte would close it
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
        """Close on out-of-band data, which HTTP does not have."""
        self.handle_close()


def _room() -> int:
    """The most connections, as the limit of open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, (files - OTHER_FILES) // FILES))


class Listener(TcpWSGIServer):
    """The listening socket and its connections.

    Attributes:
        closing: close each connection after its next response.
    """

    channel_class = Channel
    closing = False
    active_channels: Any
    trigger: Any
    task_dispatcher: Any
    socket: Any

    def maintenance(self, now: float) -> None:
        """Close overdue connections."""
        for channel in list(self.active_channels.values()):
            if channel.is_overdue(now):
                channel.handle_close()

    def handle_accept(self) -> None:
        super().handle_accept()
        # Only after accepting: the new socket could otherwise reuse the number of a closed one whose events are still
        # being processed.
        if len(self.active_channels) > _room():
            late = time.time() - GRACE
            waiting = [each for each in self.active_channels.values() if not each.requests and each.since() <= late]
            if waiting:
                min(waiting, key=Channel.since).handle_close()

    def handle_error(self) -> None:
        """Log an error that affects one connection only."""
        logger.exception("Accepting a connection failed.")

    def is_sending(self) -> bool:
        """Whether responses are in progress or waiting for their clients to read. Any thread."""
        return any(channel.requests or channel.total_outbufs_len for channel in list(self.active_channels.values()))

    def stop_listening(self) -> None:
        self.accepting = False
        self.socket.close()
        self.del_channel()

    def hang_up(self) -> None:
        for channel in list(self.active_channels.values()):
            channel.handle_close()
        self.trigger.close()
