"""The ``openai`` client: loaded, looked at, and asked in one way for everything.

Rule: the library is imported inside the functions only, first on the engine's worker thread. What is named here is all
that the other files touch. Answers are plain JSON: what a server says beyond OpenAI's own is kept, and no model of the
library's has to be built of each token.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

from lmbridge.engines.parts import missing_members, missing_parameters
from lmbridge.errors import MissingDependencyError

INSTALL = 'pip install "lmbridge[openai]"'
CONNECT_TIMEOUT = 5.0
"""Seconds for a connection to be made."""
ANSWER_TIMEOUT = 10.0
"""Seconds for the answer to a question about the server itself."""

_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence before the first question, seconds between two, and how many may go unanswered."""

PARAMETERS = {
    "openai:AsyncOpenAI": ("base_url", "api_key", "max_retries", "timeout"),
    "openai:AsyncOpenAI.get": ("path", "cast_to", "options"),
    "openai:AsyncOpenAI.post": ("path", "cast_to", "body", "options", "stream", "stream_cls"),
    "openai:AsyncOpenAI.close": (),
    "openai:Timeout": ("timeout", "connect"),
}
"""Callable to the parameters given to it."""
MEMBERS = {
    "openai:AsyncStream": ("__aenter__", "__aexit__", "__anext__", "response"),
    "openai:APIError": ("message", "body", "code", "param", "type"),
    "openai:APIStatusError": ("status_code", "response"),
    "openai:APIConnectionError": (),
    "openai:OpenAIError": (),
}
"""Class to its members. Those that only instances have are annotated in the class."""


def import_library() -> None:
    """See that the client is there and has what the engine relies on.

    Raises:
        MissingDependencyError: it is not installed, or has changed; the message names what is missing.
    """
    try:
        openai = importlib.import_module("openai")
    except ImportError as cause:
        raise MissingDependencyError(f"The engine 'openai' needs the openai client ({cause}): {INSTALL}") from cause
    missing = [*missing_parameters(PARAMETERS), *missing_members(MEMBERS)]
    if missing:
        raise MissingDependencyError(
            f"openai {openai.__version__} lacks what this engine relies on: {', '.join(missing)}. Install another "
            f"version: {INSTALL}"
        )


def make_client(url: str, api_key: str | None) -> Any:
    """A client for one server. Many servers want no key, and the library insists on one."""
    import openai

    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=None)


async def get(client: Any, path: str) -> Any:
    """What the server says of itself there."""
    import openai

    timeout = openai.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
    return await client.get(path, cast_to=object, options={"timeout": timeout})


async def post(client: Any, path: str, body: Mapping[str, Any]) -> Any:
    """The whole answer, whenever it comes: deadlines are the bridge's, which aborts."""
    return await client.post(path, body=body, cast_to=object, options=_patient())


async def stream(client: Any, path: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Any]:
    """The answer's chunks. Leaving the block closes the connection, unless the answer was complete."""
    import openai

    kind = openai.AsyncStream[object]
    opened = await client.post(path, body=body, cast_to=object, options=_patient(), stream=True, stream_cls=kind)
    _keep_alive(opened.response.extensions.get("network_stream"))
    return cast("AbstractAsyncContextManager[Any]", opened)


def _keep_alive(connection: Any) -> None:
    """Have the system notice a host that is gone without a word, or that has been started anew since."""
    found = None if connection is None else connection.get_extra_info("socket")
    if found is None:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _patient() -> dict[str, Any]:
    import openai

    return {"timeout": openai.Timeout(None, connect=CONNECT_TIMEOUT)}
