"""Connections, and the socket that they come by: how much time and room each client has.

Rule: the thread that reads all connections, but for ``service`` and ``write_soon``, which are the pool's.
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

CONNECTIONS = 1000  # open at once; beyond, whoever has sent no whole request for the longest makes room
GRACE = 1.0  # seconds in which whoever has just connected, or begun to send, need not make room
FILES = 3  # that a connection may take: its socket, and a large body and answer
OTHER_FILES = 100  # that the process may want to open
HEAD_LIMIT = 64 * 1024  # bytes
HEAD_TIME = 10.0  # seconds for the head of a request, from its first byte
BODY_TIME = 60.0  # seconds for all of it
IDLE_TIME = 30.0  # seconds that a connection is kept open without a request
READ_TIME = 30.0  # seconds in which a client must take something of its answer; it then counts as gone
LINGER_TIME = 2.0  # seconds in which what a client still sends is thrown away, so that it reads why it was refused
LINGER_BYTES = 64 * 1024 * 1024  # that are thrown away so

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Channel(HTTPChannel):
    """One connection; what is not about writing a response happens on the thread that reads.

    Attributes:
        lingers: what comes after the response is thrown away for a while: closed with something unread, a connection
            is reset, and the client may never see why.
        closed_here: called when the connection is closed by this side.
    """

    server: Any
    request: Any
    socket: Any

    parser_class = Request
    task_class = Answer
    error_task_class = Refusal
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
        if self.socket is None:  # closed by what it has read
            return
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


class Listener(TcpWSGIServer):
    """The socket that listens, and all connections of it.

    Attributes:
        closing: each connection is closed after its next response.
    """

    channel_class = Channel
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
        super().handle_accept()
        # Not before: the number of a socket that is closed now may be the new one's, and what was seen of the old one
        # is still to be looked at.
        if len(self.active_channels) > _room():
            late = time.time() - GRACE
            waiting = [each for each in self.active_channels.values() if not each.requests and each.since() <= late]
            if waiting:
                min(waiting, key=Channel.since).handle_close()

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
