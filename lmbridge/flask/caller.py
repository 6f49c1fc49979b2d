"""What an HTTP request does with a bridge: in its own account, and not a moment longer than somebody waits for it.

Rule: a ``RequestBridge`` belongs to one HTTP request. It ends with the request, with the response that streams from it,
or when the client goes away; whatever it has running then is aborted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

from flask import Flask, current_app, g, has_request_context, request
from werkzeug.local import LocalProxy

from lmbridge.caller.batch import Result
from lmbridge.caller.futures import ResponseFuture
from lmbridge.caller.stream_group import StreamGroup
from lmbridge.caller.streams import Stream
from lmbridge.client import Client
from lmbridge.errors import DisconnectedError, LMBridgeError, RequestAbortedError, fresh
from lmbridge.flask import tracing
from lmbridge.flask.disconnect import watch
from lmbridge.flask.models import Models, current_models
from lmbridge.flask.signals import answered, disconnected, failed
from lmbridge.messages import GenerationConfig, Request, Response

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

Reader = Stream | StreamGroup


class RequestBridge(Client):
    """A bridge as one HTTP request sees it: the verbs, in the request's account.

    Args:
        bridge: whose engine it asks.
        model: the name it is served under.
        account: whose turn the requests take.
        app: the sender of signals.
        models: where a lost client is counted.
    """

    def __init__(self, bridge: Bridge, model: str, account: str, app: Flask, models: Models) -> None:
        super().__init__(bridge._server_thread, account, bridge=bridge)
        self.model = model
        self._app = app
        self._models = models
        self._lock = threading.Lock()
        self._gone = False  # guarded by _lock; read by anyone
        self._readers: list[tuple[Reader, list[tracing.Trace]]] = []
        self._unwatch: Callable[[], None] = lambda: None

    def watch(self, environ: dict[str, Any]) -> RequestBridge:
        """Abort everything as soon as the client of this HTTP request goes away."""
        self._unwatch = watch(environ, self.lost)
        return self

    def finish(self) -> None:
        """The HTTP request is over: abort what still runs, and report what came of its streams."""
        self._unwatch()
        for reader, _ in self._readers:
            reader.close()
        self.close()
        for reader, traces in self._readers:
            results = reader.responses if isinstance(reader, StreamGroup) else [_result(reader)]
            for trace, result in zip(traces, results, strict=True):
                self._report(trace, result)
        self._readers.clear()

    def lost(self) -> None:
        """The HTTP client has gone: abort everything, and tell. The first call counts."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
        self._models.count_disconnect()
        error = DisconnectedError("The HTTP client went away; generation was aborted.")
        for reader, _ in list(self._readers):
            reader.close(fresh(error))
        self.close(error)
        disconnected.send(self._app, model=self.model)

    # --- the client's own work, traced and reported ---

    def run(self, request: Request) -> Response:
        with self._traced(request) as trace:
            response = super().run(request)
        self._report(trace, response)
        return response

    def run_batch(
        self, prompts: Sequence[Any], config: GenerationConfig | None, options: Any, keep: bool, progress: bool
    ) -> list[Result]:
        with self._traced(None) as trace:  # one span for all of them
            results = super().run_batch(prompts, config, options, keep, progress)
        trace.end()
        for result in results:
            self._report(trace, result)
        return results

    async def run_async(self, request: Request, owner: object) -> Response:
        with self._traced(request) as trace:
            response = await super().run_async(request, owner)
        self._report(trace, response)
        return response

    def open_stream(self, request: Request, owner: object) -> Stream:
        with self._traced(request) as trace:
            stream = super().open_stream(request, owner)
        self._readers.append((stream, [trace]))
        return stream

    def open_group(self, requests: Sequence[Request], owner: object) -> StreamGroup:
        with contextlib.ExitStack() as stack:
            traces = [stack.enter_context(self._traced(request)) for request in requests]
            group = super().open_group(requests, owner)
        self._readers.append((group, traces))
        return group

    def open_future(self, request: Request, owner: object) -> ResponseFuture:
        with self._traced(request) as trace:
            future = super().open_future(request, owner)
        future.add_done_callback(lambda done: self._report(trace, _future_result(done)))
        return future

    @contextlib.contextmanager
    def _traced(self, request: Request | None) -> Iterator[tracing.Trace]:
        """A span around a submission; it ends here only if that fails."""
        raw = request is not None and request.raw and isinstance(request.prompt, str)
        with tracing.begin(self.model, "text_completion" if raw else "chat") as trace:
            try:
                yield trace
            except LMBridgeError as error:
                self._report(trace, error)
                raise

    def _report(self, trace: tracing.Trace, result: Response | BaseException) -> None:
        trace.end(result)
        if isinstance(result, Response):
            answered.send(self._app, model=self.model, response=result)
        else:
            failed.send(self._app, model=self.model, error=result)


def request_bridge(name: str | None = None) -> RequestBridge:
    """The bridge of that name, or the default one, as the current HTTP request sees it; made when first asked for.

    Raises:
        ModelNotFoundError: there is no model of that name.
        BridgeClosedError: the server is shutting down.
        RuntimeError: there is no current app, or it has no lmbridge.
    """
    models = current_models()
    name = models.default if name is None else name
    bridge = models.bridge(name)
    models.check_open()
    callers: dict[str, RequestBridge] = g.setdefault("_lmbridge", {})
    if name not in callers:
        app = cast(Any, current_app)._get_current_object()
        in_request = has_request_context()
        caller = RequestBridge(bridge, name, models.account(request) if in_request else "application", app, models)
        callers[name] = caller.watch(request.environ) if in_request else caller
    return callers[name]


def take_callers() -> list[RequestBridge]:
    """The current request's callers, whose end is from now on the taker's business."""
    return list(g.pop("_lmbridge", {}).values())


def finish_callers(_: BaseException | None = None) -> None:
    """End what the request, or whatever else had the app's context, has left running."""
    for caller in take_callers():
        caller.finish()


current_bridge = cast(RequestBridge, LocalProxy(request_bridge))
"""The default model's bridge as the current HTTP request sees it: ``current_bridge.infer(prompt)`` in any view."""


def _future_result(future: Future[Response]) -> Response | BaseException:
    if future.cancelled():
        return RequestAbortedError("The future was cancelled.")
    return future.exception() or future.result()


def _result(stream: Stream) -> Response | BaseException:
    try:
        return stream.response
    except LMBridgeError as error:
        return error
