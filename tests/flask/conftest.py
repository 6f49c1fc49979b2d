"""Real WSGI servers, each in a thread of this process or in a process of its own, on a port the system chose."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from werkzeug.serving import make_server

Serve = Callable[[Flask], AbstractContextManager[str]]


class Ends(logging.Handler):
    """Counts the requests to bridges that have had the server's last word, of which the log tells."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._count = 0
        self._changed = threading.Condition()
        logger = logging.getLogger("lmbridge")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName == "log_end":
            with self._changed:
                self._count += 1
                self._changed.notify_all()

    def wait_for(self, count: int) -> bool:
        """Whether so many have ended, within a minute."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count >= count, 60)

    def close(self) -> None:
        logger = logging.getLogger("lmbridge")
        logger.removeHandler(self)
        logger.setLevel(logging.NOTSET)
        super().close()


@contextmanager
def on_werkzeug(app: Flask) -> Iterator[str]:
    """Serve ``app`` by Werkzeug's threaded server; gives the URL."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextmanager
def on_waitress(app: Flask) -> Iterator[str]:
    """Serve ``app`` by waitress, asked to look for lost clients."""
    from waitress.server import create_server

    server: Any = create_server(app, host="127.0.0.1", port=0, threads=16, channel_request_lookahead=1)
    thread = threading.Thread(target=server.run)
    thread.start()

    def end() -> None:
        server.close()
        for channel in list(server._map.values()):  # or the loop goes on for the connections that are kept alive
            channel.close()

    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        with contextlib.suppress(OSError):  # the loop was awake already, and has closed what would have woken it
            server.trigger.pull_trigger(end)
        thread.join(10)
        server.task_dispatcher.shutdown()


@contextmanager
def on_serve(app: Flask) -> Iterator[str]:
    """Serve ``app`` by the server of ``lmbridge serve``."""
    from lmbridge.flask.http_server import HttpServer

    server = HttpServer(app, "127.0.0.1", 0, 16, 1 << 20)
    server.open()
    try:
        yield server.url
    finally:
        server.close()


@contextmanager
def on_gunicorn(folder: Path, source: str) -> Iterator[str]:
    """Serve ``app`` of a module with this source by a real gunicorn, with one worker of threads."""
    (folder / "served.py").write_text(textwrap.dedent(source))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", "16", "-b", f"127.0.0.1:{port}"]
    environ = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen([*command, "served:app"], cwd=folder, env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"Booting worker" in line:
                break
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            drain.join(10)


@pytest.fixture(params=[on_werkzeug, on_waitress, on_serve], ids=["werkzeug", "waitress", "serve"])
def serve(request: pytest.FixtureRequest) -> Serve:
    found: Serve = request.param
    return found
