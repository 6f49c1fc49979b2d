"""A bridge under load, and the same engine without the bridge, for comparison.

Rule: ``BridgeTarget`` is used on the clients' threads, ``Native`` on the main thread; what ``Native`` does inside the
engine runs on the engine's own thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmbridge.cli.bench.load import Ask, Row
from lmbridge.errors import EngineDeadError
from lmbridge.messages import Delta, GenerationConfig, Request, Response

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge
    from lmbridge.client import Client
    from lmbridge.engines.base import Engine

LOOK = 1.0  # seconds between checks that the engine is alive


def engine_of(bridge: Bridge) -> tuple[Engine, asyncio.AbstractEventLoop]:
    """The bridge's engine, and the loop it runs on.

    Raises:
        EngineDeadError: there is no engine, or its thread does not respond.
    """
    found = bridge._server_thread.ask_engine(lambda engine: (engine, asyncio.get_running_loop()))
    if found is None:
        raise EngineDeadError("The engine is gone.")
    return found


class BridgeTarget:
    """Sends prompts through a bridge; each client thread has its own Client."""

    def __init__(self, bridge: Bridge, config: GenerationConfig, timeout: float, stream: bool) -> None:
        self._bridge = bridge
        self._config = config
        self._timeout = timeout
        self._stream = stream
        self._clients: dict[int, Client] = {}  # each key is written by its own thread only

    def connect(self, client: int) -> Ask:
        own = self._clients.get(client)
        if own is None:
            own = self._clients[client] = self._bridge.client(f"bench-{client}")
        return functools.partial(self._read if self._stream else self._wait, own)

    def stop(self) -> None:
        for client in list(self._clients.values()):
            client.close()

    def kind(self, error: BaseException) -> str:
        return type(error).__name__

    def count_tokens(self, prompt: str) -> int:
        """Count a prompt's tokens as the engine does, with the model's own tokenizer."""
        return self._bridge.infer(prompt, max_new_tokens=1, timeout=self._timeout).usage.prompt_tokens

    def _read(self, client: Client, prompt: str, row: Row) -> None:
        stream = client.stream(prompt, self._config, timeout=self._timeout)
        for delta in stream:
            row.grew(len(delta.token_ids) or int(bool(delta.text)))  # some engines report no token ids
        _note(stream.response, row)

    def _wait(self, client: Client, prompt: str, row: Row) -> None:
        """Wait for the whole answer; the timings of the first and the other tokens are the bridge's own."""
        response = client.infer(prompt, self._config, timeout=self._timeout)
        _note(response, row)
        first, tokens = response.timings.first_token, response.usage.completion_tokens
        if first is not None:
            row.first_token = row.sent - row.due + first
            row.gaps = [(response.timings.total - first) / (tokens - 1)] if tokens > 1 else []


def _note(response: Response, row: Row) -> None:
    row.queued = response.timings.queued
    row.prompt_tokens = response.usage.prompt_tokens
    row.completion_tokens = response.usage.completion_tokens
    row.finish_reason = response.finish_reason


@dataclass(frozen=True)
class NativeRound:
    """The figures of the engine without the bridge."""

    requests: int
    tokens: int
    failed: int
    seconds: float


class Native:
    """Drives the bridge's engine directly on its own loop, so that no answer crosses threads.

    The bridge must be idle meanwhile. Both share one loaded model, so both have the same caches and memory.
    """

    def __init__(self, bridge: Bridge, config: GenerationConfig, clients: int) -> None:
        self._bridge = bridge
        self._config = config
        self._clients = clients

    def run(self, prompts: Sequence[str]) -> NativeRound:
        """Run ``prompts``, as many at once as there are clients and the engine allows.

        Raises:
            EngineDeadError: the engine died.
        """
        engine, loop = engine_of(self._bridge)
        restarts = self._bridge.health().restarts
        work = _NativeWork(engine, self._config, prompts)
        try:
            future = asyncio.run_coroutine_threadsafe(work.run(self._clients), loop)
            while not concurrent.futures.wait([future], LOOK).done:
                health = self._bridge.health()
                if health.state != "ready" or health.restarts != restarts:
                    raise EngineDeadError(f"The engine died ({health.reason}).")
            return future.result()
        finally:  # also after Ctrl-C, anywhere above
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(work.stop)


class _NativeWork:
    """One native round. Runs on the engine's thread, except for ``__init__``."""

    def __init__(self, engine: Engine, config: GenerationConfig, prompts: Sequence[str]) -> None:
        self._engine = engine
        self._config = config
        self._prompts = iter(prompts)
        self._left = len(prompts)
        self._requests = len(prompts)
        self._tokens = 0
        self._failed = 0
        self._numbers = itertools.count(1)
        self._running: set[str] = set()
        self._done = asyncio.Event()

    async def run(self, clients: int) -> NativeRound:
        began = time.monotonic()
        for _ in range(min(clients, self._engine.max_batch_size, self._requests)):
            self._next()
        await self._done.wait()
        return NativeRound(self._requests, self._tokens, self._failed, time.monotonic() - began)

    def stop(self) -> None:
        """Stop now, whether or not the round has begun or ended."""
        self._prompts = iter(())
        for request_id in list(self._running):
            self._engine.abort_request(request_id)
        self._done.set()

    def _next(self) -> None:
        prompt = next(self._prompts, None)
        if prompt is None:
            return
        request_id, now = f"native-{next(self._numbers)}", time.monotonic()
        request = Request(request_id, prompt, self._config, False, "native", 0, None, now, copy_context())
        self._running.add(request_id)
        try:
            self._engine.add_request(request, self._sink(request_id))
        except Exception:
            self._end(request_id, failed=True)

    def _sink(self, request_id: str) -> Callable[[Delta], None]:
        seen = 0

        def sink(delta: Delta) -> None:
            nonlocal seen
            seen += len(delta.token_ids)
            if delta.error is not None or delta.finish_reason is not None:
                self._tokens += seen if delta.usage is None else delta.usage.completion_tokens
                self._end(request_id, failed=delta.error is not None)

        return sink

    def _end(self, request_id: str, failed: bool) -> None:
        """Start the next request after the engine's current step, as the server does."""
        self._running.discard(request_id)
        self._failed += failed
        self._left -= 1
        if self._left:
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._done.set()
