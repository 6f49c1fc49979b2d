"""Notices that an HTTP client has gone away, while the model is silent too.

Rule: one thread watches all connections of the process. A WSGI server notices a broken connection when it writes; a
view that waits for a model writes nothing. Linux only (epoll); elsewhere, and on servers that hide their socket, a
stream's next token or heartbeat finds out.

A client that closes its sending half and waits for the answer looks as if it had gone, and is taken for gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

SOCKETS = ("werkzeug.socket", "gunicorn.socket", "lmbridge.socket")  # where servers put theirs into the environ
IDLE = 2.0  # seconds
ASKED_EVERY = 0.25  # seconds between two questions to servers that have to be asked
_GONE = getattr(select, "EPOLLRDHUP", 0) | getattr(select, "EPOLLHUP", 0) | getattr(select, "EPOLLERR", 0)

OnGone = Callable[[], None]
ToTell = weakref.WeakMethod[OnGone]


def watch(environ: Mapping[str, Any], on_gone: OnGone) -> Callable[[], None]:
    """Call ``on_gone``, once and on a thread of its own, when the client of this request goes away.

    Returns what ends the watch; it must be called before the server closes the connection. ``on_gone`` is a method and
    is held weakly: a server that forgets to close a response must not keep what it would have closed.
    """
    told = weakref.WeakMethod(on_gone)
    asked = environ.get("waitress.client_disconnected")
    sock = next((environ[key] for key in SOCKETS if key in environ), None)
    if not hasattr(select, "epoll"):
        return _nothing
    end: Callable[[], None] | None = None
    while end is None:  # a thread that has ended is followed by another
        if asked is not None:
            end = _watcher().ask(asked, told)
        elif sock is not None:
            end = _watcher().watch(sock.fileno(), told)
        else:
            end = _nothing
    return end


def _nothing() -> None:
    pass


class _Watcher:
    """The thread and what it watches. It ends when it finds nothing to watch, at which it looks every IDLE seconds."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self.ended = False  # guarded by _lock, as are the next two
        self._lock = threading.Lock()
        self._sockets: dict[int, ToTell] = {}
        self._asked: dict[object, tuple[Callable[[], bool], ToTell]] = {}
        threading.Thread(target=self._run, name="lmbridge disconnects", daemon=True).start()

    def watch(self, fd: int, on_gone: ToTell) -> Callable[[], None] | None:
        """Returns None when the thread has ended meanwhile."""
        with self._lock:
            if self.ended:
                return None
            self._sockets[fd] = on_gone
            try:
                self._epoll.register(fd, _GONE | select.EPOLLONESHOT)
            except OSError:  # closed already, or watched already by a view that began twice
                del self._sockets[fd]
                return _nothing
        return lambda: self._unwatch(fd, on_gone)

    def ask(self, is_gone: Callable[[], bool], on_gone: ToTell) -> Callable[[], None] | None:
        """The same for a server that has to be asked."""
        token = object()
        with self._lock:
            if self.ended:
                return None
            self._asked[token] = is_gone, on_gone
            os.eventfd_write(self._wake, 1)
        return lambda: self._unask(token)

    def _unwatch(self, fd: int, on_gone: ToTell) -> None:
        with self._lock:
            if self._sockets.get(fd) is on_gone:
                del self._sockets[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def _unask(self, token: object) -> None:
        with self._lock:
            self._asked.pop(token, None)

    def _run(self) -> None:
        while True:
            found = self._epoll.poll(ASKED_EVERY if self._asked else IDLE)
            if not found and self._end():
                return
            for fd, _ in found:
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                else:
                    self._tell(self._take(fd))
            for token, (is_gone, on_gone) in dict(self._asked).items():  # a copy in one step
                if is_gone():
                    self._unask(token)
                    self._tell(on_gone)

    def _end(self) -> bool:
        with self._lock:
            self._sockets = {fd: told for fd, told in self._sockets.items() if told() is not None}
            self._asked = {token: pair for token, pair in self._asked.items() if pair[1]() is not None}
            self.ended = not self._sockets and not self._asked
            if self.ended:
                self._epoll.close()
                os.close(self._wake)
            return self.ended

    def _take(self, fd: int) -> ToTell | None:
        """Whom to tell. The number may belong to a newer connection by now, so the kernel is asked again."""
        with self._lock:
            poll = select.poll()
            poll.register(fd, select.POLLRDHUP)
            if fd not in self._sockets or not poll.poll(0):
                return None
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
            return self._sockets.pop(fd)

    def _tell(self, told: ToTell | None) -> None:
        on_gone = None if told is None else told()
        if on_gone is None:
            return
        try:
            on_gone()
        except Exception:  # the others' connections must still be watched
            logger.exception("What was to be done about a lost connection failed.")


_making = threading.Lock()
_made: _Watcher | None = None


def _watcher() -> _Watcher:
    """This process's watcher; a child of a fork gets one of its own."""
    global _made, _making
    if _made is not None and _made.pid != os.getpid():  # forked: whoever held the lock does not exist here
        _made, _making = None, threading.Lock()
    with _making:
        if _made is None or _made.ended:
            _made = _Watcher()
        return _made
