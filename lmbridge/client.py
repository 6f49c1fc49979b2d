"""The caller's end: a client lends each call a channel, sends it, and waits for its outcome.

Rule: runs on any thread but the server's, and never touches the engine.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from lmbridge.caller.batch import Batch, Result
from lmbridge.caller.futures import ResponseFuture
from lmbridge.caller.prompts import check_prompt, is_batch
from lmbridge.caller.stream_group import StreamGroup
from lmbridge.caller.streams import AsyncStream, Stream
from lmbridge.caller.verbs import CallOptions, Verbs
from lmbridge.crossing.call import Call, timeout_error
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.errors import BridgeClosedError, InvalidRequestError, LMBridgeError, QueueFullError, RequestAbortedError
from lmbridge.messages import GenerationConfig, Request, Response
from lmbridge.server.server import Server

if TYPE_CHECKING:
    from lmbridge.server.thread import ServerThread

_ids = itertools.count(1)
_PREFIX = f"req-{secrets.token_hex(3)}"
_LONGEST = threading.TIMEOUT_MAX / 2  # seconds; a lock waits no longer, not even for math.inf
_DEFAULT_CONFIG = GenerationConfig()  # never handed out: engines get it, and engines do not write


class Client(Verbs):
    """A fairness account with its own pair of queues; safe from any thread.

    Its pair serves one call at a time; nested and concurrent calls borrow others. ``with bridge.client() as client``
    closes it, which aborts what it has running.
    """

    def __init__(self, host: ServerThread, name: str, bridge: object = None) -> None:
        self.name = name
        self._server_thread = host
        self._bridge = bridge  # keeps it alive; None for a thread's own client, which the bridge holds itself
        # Its pair while no call uses it; append and pop are atomic. It goes with the client: a finalizer that gave it
        # back would run after the garbage collector has cut the server's weak reference to it.
        self._own: list[Channel] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Client {self.name!r}{' closed' if self._closed else ''}>"

    def _client(self) -> Client:
        return self

    def close(self, error: LMBridgeError | None = None) -> None:
        """Abort what runs in this client's name through it, and refuse further calls. The bridge goes on.

        Args:
            error: what its callers are told; default: BridgeClosedError.
        """
        self._closed = True
        server = self._server_thread.running()
        if server is not None:
            server.run_soon(lambda: server.abort_where(self._is_mine, error or self._closed_error()))
            while self._own:
                server.give_back(self._own.pop())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- what the verbs are made of ---

    def request(self, prompt: Any, config: GenerationConfig | None, options: CallOptions) -> Request:
        """Check everything and make the request; nothing has been sent when this raises."""
        timeout = options.pop("timeout", self._server_thread.timeout)
        client, raw, priority, request_id = self.name, False, 0, None
        if options:
            client = _checked_text(options.pop("client", client), "client")
            raw = options.pop("raw", raw)
            priority = _checked_priority(options.pop("priority", priority))
            request_id = options.pop("request_id", None)
        if options or config is not None:
            config = _merge(config, options)
        now = time.monotonic()
        return Request(
            f"{_PREFIX}-{next(_ids)}" if request_id is None else _checked_text(request_id, "request_id"),
            prompt if type(prompt) is str and prompt else check_prompt(prompt),
            config or _DEFAULT_CONFIG,
            raw,
            client,
            priority,
            None if timeout is None else now + _checked_timeout(timeout),
            now,
            contextvars.copy_context(),
        )

    def run(self, request: Request) -> Response:
        """Send one request and block for its answer."""
        server = self._server_thread.server(True)
        if self._closed:
            raise self._closed_error()
        try:
            channel = self._own.pop()
        except IndexError:  # it is in use, or was never needed so far
            channel = server.lease()
        call = Call(request, channel, self)
        try:
            if server.gate.try_enter(call) or server.gate.enter(call):
                server.submit(call)
            else:
                call.settle(timeout_error(call))
            self._await_outcome(server, call)
        except QueueFullError:
            self._take_back(server, call.channel)
            raise
        except BaseException:  # KeyboardInterrupt, or an exception thrown into this thread
            call.settle(RequestAbortedError("The waiting thread was interrupted."))
            server.abort(call)
            raise
        if call.ended:
            self._take_back(server, call.channel)
        else:
            server.abort(call)
        return call.response()

    def run_batch(
        self, prompts: Sequence[Any], config: GenerationConfig | None, options: Any, keep: bool, progress: bool
    ) -> list[Result]:
        """Send a list of requests as room allows and block for all answers."""
        requests = list(self._requests(prompts, config, options, keep))
        if not requests:
            return []
        server = self._server(blocking=True)
        channel = self._lease(server)
        results = Batch(server, channel, self, keep, progress).run(requests)
        self._take_back(server, channel)
        return results

    def open_stream(self, request: Request, owner: object) -> Stream:
        server = self._server(blocking=True)
        call = Call(request, self._lease(server), self, streaming=True)
        stream = Stream(server, call, owner, lambda call: self._take_back(server, call.channel))
        self._send_or_raise(server, call)
        return stream

    def requests(self, prompts: Sequence[Any], config: Any, options: CallOptions) -> list[Request]:
        """Check a list of prompts and make its requests; nothing has been sent when this raises."""
        if not is_batch(prompts):
            raise InvalidRequestError("stream_many takes a list of prompts; stream takes one.", "prompts")
        configs = config if isinstance(config, (list, tuple)) else [config] * len(prompts)
        if len(configs) != len(prompts):
            raise InvalidRequestError(f"There are {len(configs)} configs for {len(prompts)} prompts.", "config")
        name = options.pop("request_id", None)
        requests: list[Request] = []
        for index, (prompt, one) in enumerate(zip(prompts, configs, strict=True)):
            request = self.request(prompt, one, cast(CallOptions, dict(options)))
            if name is not None:
                request.id = f"{_checked_text(name, 'request_id')}-{index}"
            request.deadline = requests[0].deadline if requests else request.deadline  # a group shares one
            requests.append(request)
        return requests

    def open_group(self, requests: Sequence[Request], owner: object) -> StreamGroup:
        server = self._server(blocking=True)
        channel = self._lease(server)
        return StreamGroup(server, channel, self, requests, owner, lambda channel: self._take_back(server, channel))

    def open_future(self, request: Request, owner: object) -> ResponseFuture:
        server = self._server(blocking=True)
        dispatcher = self._server_thread.dispatcher(server)
        call = Call(request, dispatcher.channel, self)
        future = ResponseFuture(server, call, owner)
        dispatcher.expect(call, future)
        try:
            self._send_or_raise(server, call)
        except BaseException:
            dispatcher.forget(call)
            raise
        return future

    async def run_async(self, request: Request, owner: object) -> Response:
        """Send one request and await its answer; a stream nobody reads bit by bit."""
        return await self.open_async_stream(request, owner, streaming=False).whole()

    async def run_batch_async(
        self, prompts: Sequence[Any], config: GenerationConfig | None, options: Any, keep: bool, owner: object
    ) -> list[Result]:
        """Send a list of requests and await all answers; the first error cancels, and so aborts, the rest."""
        requests = list(self._requests(prompts, config, options, keep))
        tasks = [asyncio.ensure_future(self._one_of_batch(i, r, owner)) for i, r in enumerate(requests)]
        try:
            return list(await asyncio.gather(*tasks, return_exceptions=keep))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    def open_async_stream(self, request: Request, owner: object, streaming: bool = True) -> AsyncStream:
        server = self._server(blocking=False)
        port = self._server_thread.port(server, asyncio.get_running_loop())
        return AsyncStream(server, Call(request, port.channel, self, streaming), owner, port)

    # --- their parts ---

    def _server(self, blocking: bool) -> Server:
        server = self._server_thread.server(blocking)
        if self._closed:
            raise self._closed_error()
        return server

    def _requests(
        self, prompts: Sequence[Any], config: GenerationConfig | None, options: Any, keep: bool
    ) -> Iterator[Request | LMBridgeError]:
        if "request_id" in options and len(prompts) > 1:
            raise InvalidRequestError("request_id names one request; leave it out for a list.", "request_id")
        deadline = self.request("x", config, cast(CallOptions, dict(options))).deadline  # a list shares one
        for index, prompt in enumerate(prompts):
            try:
                request = self.request(prompt, config, cast(CallOptions, dict(options)))
                request.deadline = deadline
                yield request
            except LMBridgeError as error:
                error.index = index
                if not keep:
                    raise
                yield error

    async def _one_of_batch(self, index: int, request: Request | LMBridgeError, owner: object) -> Response:
        if isinstance(request, LMBridgeError):
            raise request
        try:
            return await self.run_async(request, owner)
        except LMBridgeError as error:
            error.index = index
            raise

    def _send_or_raise(self, server: Server, call: Call) -> None:
        """Enter the gate and send a call that nobody waits on yet."""
        try:
            if not server.gate.enter(call):
                raise timeout_error(call)
            server.submit(call)
        except BaseException as error:
            call.settle(error)
            server.abort(call)
            raise

    def _await_outcome(self, server: Server, call: Call) -> None:
        deadline = call.request.deadline
        while not call.outcomes:
            call.signalled = False
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                call.settle(timeout_error(call))
                return
            try:
                call.channel.wait(True, remaining)
            except Empty:
                pass
            except Closed:
                call.settle(server.closed_error())

    def _lease(self, server: Server) -> Channel:
        try:
            return self._own.pop()
        except IndexError:
            return server.lease()

    def _take_back(self, server: Server, channel: Channel) -> None:
        if self._own or self._closed:
            server.give_back(channel)
        else:
            self._own.append(channel)

    def _is_mine(self, call: Call) -> bool:
        return call.client is self

    def _closed_error(self) -> BridgeClosedError:
        return BridgeClosedError(f"The client {self.name!r} was closed; its requests were aborted. Make a new one.")


def _merge(config: GenerationConfig | None, overrides: Any) -> GenerationConfig:
    if config is None:
        config = _DEFAULT_CONFIG
    if not isinstance(config, GenerationConfig):
        raise InvalidRequestError(
            f"config must be a GenerationConfig, not {type(config).__name__}; its fields also go as keyword arguments.",
            "config",
        )
    return config.merged(overrides)


def _checked_timeout(timeout: Any) -> float:
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout >= 0:
        return timeout if timeout < _LONGEST else _LONGEST
    raise InvalidRequestError(f"timeout must be seconds >= 0 or None, not {timeout!r}.", "timeout")


def _checked_priority(priority: Any) -> int:
    if isinstance(priority, int):
        return priority
    raise InvalidRequestError(f"priority must be an int, not {priority!r}.", "priority")


def _checked_text(value: Any, name: str) -> str:
    if isinstance(value, str) and value:
        return value
    raise InvalidRequestError(f"{name} must be a text that is not empty, not {value!r}.", name)
