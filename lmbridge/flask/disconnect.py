"""Detects that an HTTP client has disconnected, even while the model is silent.

Rule: one thread watches all connections of the process. A WSGI server notices a broken connection only when it writes,
and a view that waits for a model writes nothing. Linux only (epoll); elsewhere, and on servers that hide their socket,
a stream's next token or heartbeat notices.

A client that closes its sending half and waits for the answer looks disconnected, and is treated as such.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SOCKETS = ("werkzeug.socket", "gunicorn.socket", "lmbridge.socket")  # keys of the environ with the server's socket
CLOSED_HERE = "lmbridge.closed_here"  # a list of functions that the server calls when it closes the connection itself
IDLE = 1.0  # seconds
ASKED_EVERY = 0.25  # seconds between polls of servers that hide their socket
# The events to report, once each: otherwise the kernel keeps reporting a socket closed here that lives on in a child.
_GONE = sum(getattr(select, f"EPOLL{name}", 0) for name in ("RDHUP", "HUP", "ERR", "ONESHOT"))

OnGone = Callable[[], None]
ToTell = weakref.WeakMethod[OnGone]


def watch(environ: Mapping[str, Any], on_gone: OnGone) -> Callable[[], None]:
    """Call ``on_gone``, on its own thread, when the client of this request disconnects. Further calls must do nothing.

    Returns a function that ends the watch; call it before the server closes the connection. ``on_gone`` is a method,
    held by a weak reference: a server that forgets to close a response must not keep the method's object alive.
    """
    told = weakref.WeakMethod(on_gone)
    asked = environ.get("waitress.client_disconnected")
    sock = next((environ[key] for key in SOCKETS if key in environ), None)
    if not hasattr(select, "epoll"):
        return _nothing
    ends = []
    if asked is not None:
        ends.append(_begin(lambda watcher: watcher.ask(asked, told)))
    if (hooks := environ.get(CLOSED_HERE)) is not None:
        hook = functools.partial(_tell, told)
        hooks.append(hook)
        ends.append(functools.partial(_unhook, hooks, hook))
    if sock is not None:
        ends.append(_begin(lambda watcher: watcher.watch(sock.fileno(), told)))

    def end() -> None:
        for each in ends:
            each()

    return end


def _unhook(hooks: list[Callable[[], None]], hook: Callable[[], None]) -> None:
    with contextlib.suppress(ValueError):
        hooks.remove(hook)


def _begin(watch: Callable[[_Watcher], Callable[[], None] | None]) -> Callable[[], None]:
    """Begin a watch, with a new watcher if the last one has ended."""
    end = None
    while end is None:
        end = watch(_watcher())
    return end


def _nothing() -> None:
    pass


class _Watcher:
    """The watched connections and the watching thread, which ends after IDLE seconds with nothing to watch."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self.ended = False  # guarded by _lock, as are the next three
        self._lock = threading.Lock()
        self._sockets: dict[int, list[ToTell]] = {}  # one request may have several watches
        self._asked: dict[object, tuple[Callable[[], bool], ToTell]] = {}
        self._thread: threading.Thread | None = None
        self._pause = threading.Event()  # never set

    def watch(self, fd: int, on_gone: ToTell) -> Callable[[], None] | None:
        """Watch a socket; return None if the watcher has ended meanwhile."""
        with self._lock:
            if self.ended:
                return None
            try:
                self._epoll.register(fd, _GONE)
                self._sockets[fd] = [on_gone]  # older entries belong to a connection that was closed
            except FileExistsError:
                self._sockets.setdefault(fd, []).append(on_gone)
            except (OSError, ValueError):  # closed already
                _tell(on_gone)
                return _nothing
            self._see_that_it_runs()
        return lambda: self._drop(fd, [on_gone])

    def ask(self, is_gone: Callable[[], bool], on_gone: ToTell) -> Callable[[], None] | None:
        """Watch by polling ``is_gone``, for a server that hides its socket; otherwise like ``watch``."""
        token = object()
        with self._lock:
            if self.ended:
                return None
            self._asked[token] = is_gone, on_gone
            os.eventfd_write(self._wake, 1)
            self._see_that_it_runs()
        return lambda: self._unask(token)

    def abandon(self) -> None:
        """In a forked child: drop everything that the parent watches."""
        self._lock = threading.Lock()
        if not self.ended:
            self.ended = True
            self._epoll.close()
            os.close(self._wake)

    def _see_that_it_runs(self) -> None:
        """Start the thread if it is not running; a new one takes over all watches. The caller holds the lock."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="lmbridge disconnects", daemon=True)
            with contextlib.suppress(RuntimeError):  # too many threads; the next request tries again
                self._thread.start()

    def _drop(self, fd: int, told: Sequence[ToTell]) -> None:
        """End these watches; with the last one, stop watching the socket."""
        with self._lock:
            if fd in self._sockets:
                self._sockets[fd] = [on_gone for on_gone in self._sockets[fd] if on_gone not in told]
                if not self._sockets[fd]:
                    self._forget(fd)

    def _forget(self, fd: int) -> None:
        del self._sockets[fd]
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(fd)

    def _unask(self, token: object) -> None:
        with self._lock:
            self._asked.pop(token, None)

    def _run(self) -> None:
        while not self.ended:
            try:
                self._report_again()
                while not self.ended:
                    self._look()
            except BaseException:  # other connections must still be watched
                logger.exception("Watching for disconnected clients failed; trying again.")
                self._pause.wait(IDLE)  # so that a lasting failure does not flood the log

    def _report_again(self) -> None:
        """Rearm all sockets: an interrupted poll may have consumed their events."""
        with self._lock:
            for fd in self._sockets:
                with contextlib.suppress(OSError):  # closed meanwhile
                    self._epoll.modify(fd, _GONE)

    def _look(self) -> None:
        """Wait for disconnected clients, and report them."""
        found = self._epoll.poll(ASKED_EVERY if self._asked else IDLE)
        if not found and self._end():
            return
        for fd, _ in found:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                told = self._gone(fd)
                for on_gone in told:
                    _tell(on_gone)
                self._drop(fd, told)  # last, so that nothing is lost if this is interrupted
        for token, (is_gone, on_gone) in dict(self._asked).items():  # a copy in one step
            if _is_gone(is_gone):
                _tell(on_gone)
                self._unask(token)

    def _end(self) -> bool:
        with self._lock:
            for fd, told in list(self._sockets.items()):
                self._sockets[fd] = [on_gone for on_gone in told if on_gone() is not None]
                if not self._sockets[fd]:
                    self._forget(fd)
            self._asked = {token: pair for token, pair in self._asked.items() if pair[1]() is not None}
            self.ended = not self._sockets and not self._asked
            if self.ended:
                self._epoll.close()
                os.close(self._wake)
            return self.ended

    def _gone(self, fd: int) -> list[ToTell]:
        """Whom to notify. The number may belong to a newer connection by now, so ask the kernel again."""
        with self._lock:
            poll = select.poll()
            poll.register(fd, select.POLLRDHUP)
            return list(self._sockets.get(fd, ())) if poll.poll(0) else []


def _is_gone(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except BaseException:
        logger.exception("The server failed to say whether a client is connected; treating it as disconnected.")
        return True


def _tell(told: ToTell) -> None:
    """Notify on a new thread, because a listener may be slow, and others are waiting."""
    on_gone = told()
    if on_gone is None:
        return
    try:
        threading.Thread(target=_call, args=(on_gone,), name="lmbridge disconnected", daemon=True).start()
    except RuntimeError:  # too many threads
        _call(on_gone)


def _call(on_gone: OnGone) -> None:
    try:
        on_gone()
    except BaseException:
        logger.exception("Handling a disconnected client failed.")


_making = threading.Lock()
_made: _Watcher | None = None  # guarded by _making


def _watcher() -> _Watcher:
    """This process's watcher."""
    global _made
    with _making:
        if _made is None or _made.ended:
            _made = _Watcher()
        return _made


def _begin_anew() -> None:
    """Give a forked child its own watcher: the parent's thread, and the holders of its locks, do not exist there."""
    global _made, _making
    if _made is not None:
        _made.abandon()
    _made, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
