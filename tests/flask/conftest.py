"""Real WSGI servers, each in a thread of this process or in a process of its own, on a port the system chose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from flask import Flask
from werkzeug.serving import make_server

Serve = Callable[[Flask], AbstractContextManager[str]]


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
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        server.close()
        for channel in list(server._map.values()):  # or its loop goes on for the connections that are kept alive
            channel.close()
        thread.join(10)
        server.task_dispatcher.shutdown()


@pytest.fixture(params=[on_werkzeug, on_waitress], ids=["werkzeug", "waitress"])
def serve(request: pytest.FixtureRequest) -> Serve:
    found: Serve = request.param
    return found
