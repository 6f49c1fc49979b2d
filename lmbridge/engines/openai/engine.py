"""The engine for models on other servers: each request is one HTTP request, streamed on the bridge's loop.

Rule: everything here runs on the server thread, except ``where`` and loading the client library. Leaving a stream
closes its socket, which tells the far end that nobody is waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, ClassVar

from lmbridge.engines.base import Engine, Library, Sink
from lmbridge.engines.openai.asking import Question, put_question
from lmbridge.engines.openai.errand import Errand
from lmbridge.engines.openai.errors import NotServedError, in_our_words
from lmbridge.engines.openai.flavours import ANY, FLAVOURS, Flavour
from lmbridge.engines.openai.group import Group
from lmbridge.engines.openai.jobs import Jobs
from lmbridge.engines.openai.library import INSTALL, import_library, make_client, post, stream
from lmbridge.engines.openai.options import read_options
from lmbridge.engines.openai.reading import AnswerReader, Words
from lmbridge.engines.openai.server import Server
from lmbridge.engines.thread import EngineThread
from lmbridge.messages import Delta, Request, Task

_END = object()


class OpenAIEngine(Engine):
    """A model on one or several servers with OpenAI's API.

    Args:
        model: a URL, or several separated by commas; or the model's name, with ``base_url``.
        base_url: a URL, or a list of them: servers of one kind with the same model; default: OPENAI_BASE_URL, else
            OpenAI's own. A URL without a path gets ``/v1``.
        model_name: the model's name on the servers; default: the first listed by each of them that supports the task.
        api_key: default: OPENAI_API_KEY.
        flavour: the kind of server, which determines its fields: ``lmbridge``, ``vllm``, ``lmdeploy``, ``tabbyapi``,
            ``llamacpp`` or ``openai``; None: detected; an unknown kind gets OpenAI's fields.
        task: ``generate``, ``embed`` or ``rerank``; ``auto``: as the server reports, else ``generate``.
        max_batch_size: requests at once on all servers together; default: 64 per server.
        extra_body: added unchanged to the body of every text generation request.
    """

    name: ClassVar[str] = "openai"
    libraries = (Library("openai", "1.55 to 3.57", INSTALL),)
    supports: ClassVar[frozenset[str]] = ANY

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str] | None = None,
        model_name: str | None = None,
        api_key: str | None = None,
        flavour: str | None = None,
        task: str = "auto",
        max_batch_size: int | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        self._options = read_options(model, base_url, model_name, api_key, flavour, task, max_batch_size, extra_body)
        self.max_batch_size = self._options.max_batch_size
        if flavour is not None:
            self.supports = FLAVOURS[flavour].supports  # type: ignore[misc]  # this one's own
        if self._options.tasks is not None:
            self.tasks = self._options.tasks
        self._thread = EngineThread("lmbridge openai")
        weakref.finalize(self, self._thread.close).atexit = False
        self._servers: list[Server] = []
        self._flavour: Flavour | None = None
        self._jobs: Jobs | None = None
        self._words = Words()
        self._at: dict[str, Server | None] = {}  # request id -> its server; None while it waits for one
        self._watches: list[asyncio.Task[None]] = []
        self._tokens = 0

    def describe(self) -> str:
        urls = ", ".join(server.url for server in self._servers) or ", ".join(self._options.urls)
        model = next((server.model for server in self._servers if server.model), self._options.model or "a model")
        return f"{model} at {urls}"

    # --- start and end ---

    async def start(self) -> None:
        """Ask the servers for their models; those that do not answer are retried in the background.

        Raises:
            MissingDependencyError: the client library is missing, or has changed.
            EngineStartError: no server answers, or none has the model.
        """
        options = self._options
        clients = await self._thread.run(self._make_clients)
        self._servers = [
            Server(url, client, options.model, options.tasks) for url, client in zip(options.urls, clients, strict=True)
        ]
        self._group = Group(self._servers, lambda seconds: self.on_busy(seconds), options.flavour is None)
        first = await self._group.reach()
        self._flavour = flavour = FLAVOURS[options.flavour] if options.flavour else first.flavour
        assert flavour is not None
        self.supports = flavour.supports  # type: ignore[misc]
        self.tasks: frozenset[Task] = options.tasks or first.tasks or self.tasks
        self.instead = {task: _instead(task, first) for task in ("generate", "embed", "rerank")}
        lanes = len(self._servers)
        self._jobs = Jobs(self._send, flavour, lanes, max(1, self.max_batch_size // (2 * lanes)))
        self._watches = [_start(server.watch(), f"lmbridge watch of {server.url}") for server in self._servers]

    def _make_clients(self) -> list[Any]:
        """On the worker thread: loading the library and the certificates is slow."""
        import_library()
        options = self._options
        return [make_client(url, options.api_key, options.logins.get(url)) for url in options.urls]

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        if self._jobs is not None:
            self._jobs.close()
        await super().close()
        if self._watches:
            await asyncio.wait(self._watches)
        self._thread.close()
        for server in self._servers:
            await server.client.close()

    # --- requests ---

    def add_request(self, request: Request, sink: Sink) -> None:
        if request.job is None:
            super().add_request(request, sink)
        else:
            assert self._jobs is not None
            self._jobs.add(request, sink)

    def abort_request(self, request_id: str) -> None:
        if self._jobs is None or not self._jobs.discard(request_id):
            super().abort_request(request_id)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the request's deltas. A request that no server has started goes to the next.

        Raises:
            InvalidRequestError: the servers do not support an option, or refused the request.
            EngineError: it failed on the server, or no server is available.
        """
        assert self._flavour is not None
        question = put_question(request, self._flavour, self._options.extra_body)
        errand = Errand(self._group)
        try:
            while True:
                self._at[request.id] = None
                server = self._at[request.id] = await errand.next()
                is_chat = question.is_chat
                reader = AnswerReader(request.config, is_chat, self._flavour, self._words, server.url)
                try:
                    with server.working():
                        async with contextlib.aclosing(self._ask(server, question, reader)) as deltas:
                            async for delta in deltas:
                                yield delta
                    return
                except NotServedError as what:
                    question = await errand.failed(server, question, what, reader.has_begun)
        finally:
            self._at.pop(request.id, None)

    async def _ask(self, server: Server, question: Question, reader: AnswerReader) -> AsyncGenerator[Delta, None]:
        """Stream one server's answer."""
        body = question.to(server.model, server.unwanted)
        with in_our_words(server.url, question):
            async with await stream(server.client, question.path, body) as chunks:
                while (chunk := await _next(chunks, reader.deadline)) is not _END:
                    server.heard += 1
                    delta = reader.take(chunk)
                    if delta is not None:
                        self._tokens += len(delta.token_ids)
                        yield delta
            yield reader.finish()

    async def _send(self, question: Question) -> Any:
        """A server's complete answer."""
        errand = Errand(self._group)
        while True:
            server = await errand.next()
            try:
                with server.working(), in_our_words(server.url, question):
                    return await post(server.client, question.path, question.to(server.model, server.unwanted))
            except NotServedError as what:
                question = await errand.failed(server, question, what, False)

    # --- inspection ---

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token seen with log-probabilities; "" for others."""
        return self._words.texts(token_ids)

    def progress(self, request_id: str) -> int | None:
        """A silent server that responds to checks is making progress; waiting for a full server counts as progress
        too."""
        if request_id in self._at:
            server = self._at[request_id]
            return int(time.monotonic()) if server is None else server.heard
        if self._jobs is not None and request_id in self._jobs:
            return self._jobs.batches + sum(server.heard for server in self._servers)
        return None

    def where(self) -> str:
        busy = [f"{server.url} ({server.in_flight} requests)" for server in self._servers if server.in_flight]
        return f"it is waiting for {', '.join(busy)}" if busy else ""

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``tokens`` as reported by the servers, ``servers`` and ``servers_away``."""
        jobs = self._jobs
        return {
            "in_flight": float(len(self._running) + (0 if jobs is None else len(jobs))),
            "tokens": float(self._tokens),
            "max_batch_size": float(self.max_batch_size),
            "servers": float(len(self._servers)),
            "servers_away": float(sum(server.away is not None for server in self._servers)),
        }


def _instead(task: str, server: Server) -> str:
    """What to use for a task that the model does not support."""
    names = [name for name, tasks in server.offers.items() if task in tasks]
    if names:
        return f"one of the server's models that can: {' or '.join(f'model_name={name!r}' for name in names[:5])}"
    return f"model_name= for a model of the server that can, with task={task!r} if the server does not report tasks"


async def _next(chunks: Any, deadline: float | None) -> Any:
    """The next chunk. Does not wait for a server that has sent everything but does not end the stream."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(chunks)
    except (StopAsyncIteration, TimeoutError):
        return _END


def _start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work, name=name)
