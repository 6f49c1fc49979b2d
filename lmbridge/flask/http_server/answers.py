"""Handles a complete request: calls the app, or refuses the request.

Rule: runs on the threads of the pool.
"""

from __future__ import annotations

import json
from typing import Any

from lmbridge.flask.http_server.library import ErrorTask, WSGITask


class Refusal(ErrorTask):
    """The response to a request that never reaches the app: an error in OpenAI's form."""

    channel: Any
    request: Any
    response_headers: Any

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}."
        if error.code == 413:
            most = self.channel.adj.max_request_body_size - 1
            message = f"The request body is too large; the limit is {most:,} bytes."
        kind = "invalid_request_error" if error.code < 500 else "server_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.channel.lingers = True
        self.write(body)


class Answer(WSGITask):
    """One request that the app handles."""

    channel: Any
    request: Any

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ.pop("waitress.client_disconnected", None)  # watching the socket is faster and cheaper
        environ["lmbridge.socket"] = self.channel.socket  # ``disconnect`` watches it
        environ["lmbridge.closed_here"] = self.channel.closed_here
        return environ

    def execute(self) -> None:
        try:
            super().execute()
        except Exception:
            raise
        except BaseException as error:  # waitress would leave the connection open
            raise RuntimeError(f"The app raised {error!r}; only this response was affected.") from error

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"A WSGI response must yield bytes, not {type(data).__name__}.")
        super().write(data)

    def build_response_header(self) -> bytes:
        if self.channel.server.closing:
            self.request.headers["CONNECTION"] = "close"
        head: bytes = super().build_response_header()
        return head
