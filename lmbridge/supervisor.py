"""The life of the server thread and of the engine in it: started when first needed, rebuilt when it dies, ended once.

Rule: callers' threads ask here for the running server and get it, or the reason why there is none. What the engine goes
through is one coroutine on the server thread, ``_keep``.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from lmbridge.admission import Gate
from lmbridge.aio import LoopPort
from lmbridge.engines import EngineFactory
from lmbridge.engines.base import Engine
from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineStartError,
    LMBridgeError,
    RequestTimeoutError,
    UnsupportedEnvironmentError,
    WrongThreadError,
    fresh,
)
from lmbridge.futures import Dispatcher
from lmbridge.server import Server

logger = logging.getLogger("lmbridge")

T = TypeVar("T")
State = Literal["new", "loading", "ready", "restarting", "failed", "closing", "closed"]

MAX_FAILURES = 3  # deaths within FAILURE_WINDOW seconds after which the engine stays down
FAILURE_WINDOW = 300.0
FIRST_BACKOFF = 0.1  # seconds before the first rebuild; each further one waits four times longer
ASK_PATIENCE = 1.0  # seconds to wait for the loop's answer to a question
CLOSE_GRACE = 10.0  # seconds an engine may take to close before it is left behind


class Supervisor:
    """Starts, watches and ends one server thread with one engine."""

    def __init__(self, factory: EngineFactory, rebuildable: bool, gate: Gate, timeout: float | None) -> None:
        self.timeout = timeout
        self.gate = gate
        self.state: State = "new"  # written by the server thread once it runs
        self._factory = factory
        self._rebuildable = rebuildable
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._server: Server | None = None  # guarded by _lock when written, as are the next four
        self._thread: threading.Thread | None = None
        self._dispatcher: Dispatcher | None = None
        self._ports: dict[asyncio.AbstractEventLoop, LoopPort] = {}
        self._closed = False
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._drain_until: float | None = None  # server thread only, as are the next three
        self._stop = asyncio.Event()
        self._deaths: deque[float] = deque()
        self._dead: asyncio.Future[BaseException] | None = None

    # --- any thread ---

    def server(self, blocking: bool) -> Server:
        """The running server; starts it when this is the first call.

        Raises:
            ForkedError: the bridge was started in another process.
            BridgeClosedError: it was closed.
            WrongThreadError: ``blocking`` on the server thread.
        """
        self.check_process()
        server = self._server
        if server is None or self._closed:
            server = self._start()
        if blocking and threading.get_ident() == server.thread_id:
            raise WrongThreadError(
                "This blocking call was made on the server thread, which would wait for itself forever. "
                "Use await bridge.ainfer(...), or call from another thread."
            )
        return server

    def running(self) -> Server | None:
        """The server if there is one in this process. Takes no lock."""
        return None if self._server is None or self._server.forked else self._server

    def check_process(self) -> None:
        """Raise ForkedError in a child of the process that started the server. Comes before every lock."""
        if self._server is not None:
            self._server.check_process()
        elif self._pid != os.getpid():  # nothing had started: this process may begin anew, with a lock nobody holds
            self._pid = os.getpid()
            self._lock = threading.Lock()

    def dispatcher(self, server: Server) -> Dispatcher:
        """The dispatcher of futures; started when first needed."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    self._dispatcher = Dispatcher(server)
        return self._dispatcher

    def port(self, server: Server, loop: asyncio.AbstractEventLoop) -> LoopPort:
        """The port of somebody else's loop; made when first needed."""
        port = self._ports.get(loop)
        if port is None:
            with self._lock:
                self._ports = {other: port for other, port in self._ports.items() if not other.is_closed()}
                port = self._ports[loop] = LoopPort(server, loop)
        return port

    def ask_engine(self, question: Callable[[Engine], T]) -> T | None:
        """What ``question`` finds on the server thread; None without an engine, or when the loop does not answer."""
        server = self.running()
        if server is None:
            return None
        answer: concurrent.futures.Future[T | None] = concurrent.futures.Future()

        def ask() -> None:
            try:
                answer.set_result(None if server.engine is None else question(server.engine))
            except Exception as error:
                answer.set_exception(error)

        if threading.get_ident() == server.thread_id:
            ask()
        else:
            server.run_soon(ask)
        try:
            return answer.result(ASK_PATIENCE)
        except concurrent.futures.TimeoutError:
            return None

    def start(self, timeout: float | None) -> None:
        """Start, and block until the engine is ready.

        Raises:
            EngineStartError: it could not be loaded.
            RequestTimeoutError: it was not ready in time; loading goes on.
        """
        self.server(blocking=True)
        try:
            error = self._ready.exception(timeout)
        except concurrent.futures.TimeoutError:
            raise RequestTimeoutError(f"The engine was not ready after {timeout} s; it goes on loading.") from None
        if error is not None:
            raise fresh(error)

    def close(self, drain: bool, timeout: float) -> None:
        """End the server and wait for its thread, at most ``timeout`` seconds and some grace. Idempotent."""
        if self._server is not None and self._server.forked:  # nothing of it runs here
            return
        thread = self.request_stop(drain, timeout)
        if thread is None or threading.current_thread() is thread:
            return
        thread.join(timeout + CLOSE_GRACE + 1.0)
        if thread.is_alive():
            logger.warning("The server thread %s is stuck, probably in native code; it is left behind.", thread.name)

    def request_stop(self, drain: bool, timeout: float) -> threading.Thread | None:
        """Have the server end; does not wait. The thread to wait for, if there is one."""
        with self._lock:
            self._closed = True
            server, thread = self._server, self._thread
        if server is None:
            self.state = "closed"
        else:
            server.run_soon(functools.partial(self._begin_stop, drain, timeout))
        return thread

    def drop(self) -> bool:
        """Have the server end at once; for finalizers: takes no lock and waits for nobody. False: nothing ran."""
        server = self.running()
        if server is None or self._closed:
            return False
        self._closed = True
        server.run_soon(functools.partial(self._begin_stop, False, 0.0))
        return True

    # --- starting ---

    def _start(self) -> Server:
        with self._lock:
            if self._closed and self._server is not None and self.state == "failed":
                raise self._server.closed_error()
            if self._closed:
                raise BridgeClosedError("The bridge is closed; build a new one.")
            if self._server is None:
                _check_environment()
                server = Server(self.gate)
                self._thread = threading.Thread(target=self._run, args=(server,), name="lmbridge server", daemon=True)
                self.state = "loading"
                self._thread.start()
                self._server = server
                _started.add(self)
            return self._server

    def _run(self, server: Server) -> None:
        """The server thread, from its first to its last moment."""
        server.thread_id = threading.get_ident()
        cause: BaseException = BridgeClosedError("The bridge was closed; its requests were aborted.")
        try:
            server.loop.run_until_complete(self._keep(server))
        except BaseException as error:  # the loop was stopped from outside, or something was thrown in
            cause = error
            logger.error("The server thread ended unexpectedly: %r", error)
        finally:
            self._closed = True
            self.state = "closed" if isinstance(cause, BridgeClosedError) else "failed"
            server.close(cause)
            if not self._ready.done():
                self._ready.set_exception(server.closed_error())
            _close_loop(server.loop)
            _started.discard(self)

    # ================= the server thread only =================

    async def _keep(self, server: Server) -> None:
        """Keep an engine in the server until the bridge is closed."""
        sweep = asyncio.ensure_future(server.sweep())
        try:
            while not self._stop.is_set():
                if not await self._live(server):
                    await self._stop.wait()
            self.state = "closing"
            server.end_all(BridgeClosedError("The bridge was closed; its requests were aborted."))
        finally:
            sweep.cancel()

    async def _live(self, server: Server) -> bool:
        """One engine's life. Whether there may be a next one."""
        engine: Engine | None = None
        try:
            try:
                engine = self._factory()
                self._dead = server.loop.create_future()
                engine.on_death = functools.partial(self._on_death, self._dead)
                if not await self._start_engine(engine):
                    return True
            except Exception as cause:
                self._fail_start(server, cause)
                return False
            self.state = "ready"
            server.install(engine)
            if not self._ready.done():
                self._ready.set_result(None)
            cause_of_death = await self._death(server)
            if cause_of_death is None:
                return True
            server.fail_engine(engine, cause_of_death)
            return self._may_rebuild(server, cause_of_death) and await self._back_off()
        finally:
            if engine is not None:
                server.engine = None
                await _close_engine(engine)

    async def _start_engine(self, engine: Engine) -> bool:
        """Load the engine; False when the bridge is closed meanwhile."""
        starting = asyncio.ensure_future(_start_guarded(engine))
        await self._first_of(starting)
        if starting.done():
            starting.result()
            return True
        starting.cancel()
        await asyncio.wait([starting], timeout=CLOSE_GRACE)
        return False

    async def _death(self, server: Server) -> BaseException | None:
        """Wait until the engine dies (its cause) or the bridge is closed and drained (None)."""
        assert self._dead is not None
        await self._first_of(self._dead)
        if self._dead.done():
            return self._dead.result()
        if self._drain_until is not None:
            draining = asyncio.ensure_future(server.drained())
            patience = max(0.0, self._drain_until - time.monotonic())
            either: list[asyncio.Future[Any]] = [draining, self._dead]
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        server.end_all(BridgeClosedError("The bridge was closed; its requests were aborted."))
        return None

    def _on_death(self, dead: asyncio.Future[BaseException], cause: BaseException) -> None:
        if not dead.done():
            dead.set_result(cause)

    def _fail_start(self, server: Server, cause: Exception) -> None:
        error = EngineStartError(f"The engine could not be loaded: {cause}. Build a new Bridge once that is mended.")
        error.__cause__ = cause
        logger.error("The engine could not be loaded: %r", cause)
        self._stay_down(server, error)

    def _may_rebuild(self, server: Server, cause: BaseException) -> bool:
        logger.error("The engine died: %r", cause)
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > FAILURE_WINDOW:
            self._deaths.popleft()
        if not self._rebuildable:
            why = "it was given as an instance, which cannot be rebuilt; give a factory"
        elif len(self._deaths) >= MAX_FAILURES:
            why = f"it died {len(self._deaths)} times in {FAILURE_WINDOW:.0f} s and stays down"
        else:
            return True
        error = EngineDeadError(f"The engine is dead ({cause!r}): {why}. Build a new Bridge.")
        error.__cause__ = cause
        self._stay_down(server, error)
        return False

    def _stay_down(self, server: Server, error: LMBridgeError) -> None:
        self.state = "failed"
        server.refuse(error)
        if not self._ready.done():
            self._ready.set_exception(error)

    async def _back_off(self) -> bool:
        self.state = "restarting"
        delay = FIRST_BACKOFF * 4 ** (len(self._deaths) - 1)
        logger.warning("The engine is rebuilt in %.1f s.", delay)
        await self._first_of(timeout=delay)
        return True

    async def _first_of(self, *futures: asyncio.Future[Any], timeout: float | None = None) -> None:
        """Wait for any of ``futures``, for the call to stop, or for ``timeout`` seconds."""
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([*futures, stopping], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    def _begin_stop(self, drain: bool, timeout: float) -> None:
        if drain:
            self._drain_until = time.monotonic() + timeout
        self._stop.set()


async def _start_guarded(engine: Engine) -> None:
    """Start the engine; a library that calls exit() must not take the loop with it."""
    try:
        await engine.start()
    except (SystemExit, KeyboardInterrupt) as cause:
        raise RuntimeError(f"{engine.name} asked the process to exit: {cause!r}") from cause


async def _close_engine(engine: Engine) -> None:
    try:
        await asyncio.wait_for(engine.close(), CLOSE_GRACE)
    except asyncio.TimeoutError:
        logger.warning("The engine %s did not close within %.0f s; it is left behind.", engine.name, CLOSE_GRACE)
    except Exception:
        logger.exception("The engine %s failed while closing.", engine.name)


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what an engine left on the loop, and close it."""
    try:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except BaseException:
        logger.debug("Leftovers on the loop would not end.", exc_info=True)
    finally:
        loop.close()


def _check_environment() -> None:
    """Refuse processes whose threads are not threads."""
    patched = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", lambda name: False)("threading")
    eventlet = getattr(sys.modules.get("eventlet.patcher"), "is_monkey_patched", lambda name: False)("thread")
    if patched or eventlet:
        raise UnsupportedEnvironmentError(
            "threading is patched by gevent or eventlet, so the server thread would be a greenlet and block every "
            "other one. Use real threads: gunicorn -k gthread, for example."
        )


_started: weakref.WeakSet[Supervisor] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the bridges nobody closed; by now no non-daemon thread runs that could use them."""
    for supervisor in list(_started):
        if supervisor.running() is not None:
            logger.warning("A Bridge was not closed; use `with Bridge(...)` or bridge.close().")
            supervisor.close(drain=False, timeout=0.0)
