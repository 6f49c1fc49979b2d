"""What becomes of a request that has come whole: the app answers it, or it is refused.

Rule: a thread of the pool.
"""

from __future__ import annotations

import json
from typing import Any

from lmbridge.flask.http_server.library import ErrorTask, WSGITask


class Refusal(ErrorTask):
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


class Answer(WSGITask):
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
