"""Loads and checks the ``openai`` client, and makes all requests through it.

Rule: the library is imported inside the functions only, first on the engine's worker thread. What is named here is all
that the other files use. Answers are plain JSON: extra fields of servers are kept, and no library objects are built per
token.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, cast

from lmbridge.engines.parts import missing_members, missing_parameters
from lmbridge.errors import EngineError, MissingDependencyError

INSTALL = 'pip install "lmbridge[openai]"'
NO_KEY = "none"
CONNECT_TIMEOUT = 5.0
"""Seconds to connect."""
ANSWER_TIMEOUT = 10.0
"""Seconds for the complete answer to a query about the server itself."""
MOST_OF_AN_EVENT = 1 << 24
"""Bytes of one event of a stream."""
MOST_OF_AN_ANSWER = 1 << 26
"""Bytes of an answer that is not a stream."""

_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""TCP keepalive: idle seconds before the first probe, seconds between probes, and unanswered probes allowed."""
_EVENTS = "text/event-stream"
_END_OF_EVENT = re.compile(rb"\r?\n\r?\n|\r\r")

PARAMETERS = {
    "openai:AsyncOpenAI": ("base_url", "api_key", "max_retries", "timeout", "http_client", "default_headers"),
    "openai:AsyncOpenAI.get": ("path", "cast_to", "options"),
    "openai:AsyncOpenAI.post": ("path", "cast_to", "body", "options", "stream", "stream_cls"),
    "openai:AsyncOpenAI.close": (),
    "openai:DefaultAsyncHttpxClient": ("follow_redirects", "event_hooks"),
    "openai:Timeout": ("timeout", "connect"),
}
"""Callable to the parameters given to it."""
MEMBERS = {
    "openai:AsyncStream": ("__aenter__", "__aexit__", "__anext__", "response"),
    "openai:APIError": ("message", "body", "code", "param", "request", "type"),
    "openai:APIStatusError": ("status_code", "response"),
    "openai:APIConnectionError": (),
    "openai:OpenAIError": (),
}
"""Class to its members. Those that only instances have are annotated in the class."""


def import_library() -> None:
    """Check that the client is installed and has what the engine relies on.

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


def make_client(url: str, api_key: str | None, login: str | None) -> Any:
    """A client for one server. Many servers need no key, but the library insists on one.

    It follows no redirects, which would pass prompt and key on, and decompresses nothing: a kilobyte may hold a
        gigabyte.
    """
    import openai

    hooks: dict[str, list[Callable[..., Any]]] = {"request": [_follow], "response": [_guard]}
    http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks=hooks)
    headers = {"Accept-Encoding": "identity", **({"Authorization": login} if login else {})}
    return openai.AsyncOpenAI(
        base_url=url, api_key=api_key or NO_KEY, max_retries=0, timeout=None, http_client=http, default_headers=headers
    )


class Trip:
    """The state of a request, reported by the HTTP library.

    Attributes:
        is_new: its connection was made for it. An old one may have been closed as the request went out.
        answered: the response has begun.
    """

    def __init__(self) -> None:
        self.is_new = False
        self.answered = False

    async def __call__(self, name: str, info: object) -> None:
        self.is_new = self.is_new or name.startswith("connection.connect")
        self.answered = self.answered or name.endswith("receive_response_headers.complete")


async def _follow(request: Any) -> None:
    request.extensions = {**request.extensions, "trace": Trip()}


def trip_of(request: Any) -> Trip:
    """The state of a request that the client has sent."""
    found = request.extensions.get("trace")
    return found if isinstance(found, Trip) else Trip()


async def _guard(response: Any) -> None:
    """Limit the size of a response.

    Raises:
        EngineError: it is compressed, although uncompressed was requested.
    """
    coding = response.headers.get("content-encoding") or "identity"
    if coding.strip().lower() != "identity":
        raise EngineError(f"{response.url} sent a compressed answer ({coding[:40]}) although none was requested.")
    raw, streamed = response.aiter_raw, response.request.headers.get("accept") == _EVENTS

    async def counted(chunk_size: int | None = None) -> AsyncGenerator[bytes, None]:
        size, end = 0, b""
        async with aclosing(raw(chunk_size)) as pieces:
            async for piece in pieces:
                size += len(piece)
                if streamed and _END_OF_EVENT.search(end + piece):
                    size = 0
                end = (end + piece)[-3:]
                if size > (MOST_OF_AN_EVENT if streamed else MOST_OF_AN_ANSWER):
                    raise EngineError(f"{response.url} sent an oversized answer ({size >> 20} MiB).")
                yield piece

    response.aiter_raw = counted


async def get(client: Any, path: str) -> Any:
    """Query the server about itself."""
    import openai

    timeout = openai.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):  # the client's own timeout restarts with each piece
            return await client.get(path, cast_to=object, options={"timeout": timeout})
    except TimeoutError:
        raise TimeoutError(f"it has not answered within {ANSWER_TIMEOUT:g} s") from None


async def post(client: Any, path: str, body: Mapping[str, Any]) -> Any:
    """The complete answer, without a timeout: the bridge aborts at the deadline."""
    return await client.post(path, body=body, cast_to=object, options=_patient())


async def stream(client: Any, path: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Any]:
    """The answer's chunks. Leaving the block closes the connection, unless the answer was complete."""
    import openai

    kind = openai.AsyncStream[object]
    options = {**_patient(), "headers": {"Accept": _EVENTS}}
    opened = await client.post(path, body=body, cast_to=object, options=options, stream=True, stream_cls=kind)
    _keep_alive(opened.response.extensions.get("network_stream"))
    return cast("AbstractAsyncContextManager[Any]", opened)


def _keep_alive(connection: Any) -> None:
    """Make the OS detect a host that has vanished or restarted."""
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
