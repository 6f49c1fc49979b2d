"""The verbs, written once and shared by Bridge and Client: infer, stream, stream_many, submit, ainfer, astream.

Rule: signatures and their promises only; a ``Client`` does the work, on any thread but the server's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from lmbridge.caller.batch import Result
from lmbridge.caller.futures import ResponseFuture
from lmbridge.caller.prompts import is_batch
from lmbridge.caller.stream_group import StreamGroup
from lmbridge.caller.streams import AsyncStream, Stream
from lmbridge.messages import GenerationConfig, Message, Overrides, Response

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmbridge.client import Client

Prompts = list[str] | list[list[Message]] | list[list[int]]


class CallOptions(Overrides, total=False):
    """The keyword arguments of every verb, beside GenerationConfig's own fields.

    timeout: seconds for loading, queueing and generation together; None waits forever; default: the bridge's.
    client: the account whose turn is taken, to group threads (default: this client, or this thread).
    raw: give a text to the model as it is, without the chat template.
    priority: higher goes first; waiting raises it.
    request_id: an id of your own for ``bridge.abort`` and the logs; unique among the living.
    """

    timeout: float | None
    client: str
    raw: bool
    priority: int
    request_id: str


class Verbs:
    """infer, stream, stream_many and submit for threads; ainfer and astream for other event loops."""

    def _client(self) -> Client:
        raise NotImplementedError

    @overload
    def infer(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> Response: ...

    @overload
    def infer(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        *,
        progress: bool = False,
        return_exceptions: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> list[Response]: ...

    @overload
    def infer(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        *,
        progress: bool = False,
        return_exceptions: Literal[True],
        **options: Unpack[CallOptions],
    ) -> list[Result]: ...

    def infer(
        self,
        prompt: Any,
        config: GenerationConfig | None = None,
        *,
        progress: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Generate and block for the whole answer; a list of prompts gives a list of answers in the same order.

        Args:
            prompt: a text, a conversation (list of messages), token ids, or a list of these.
            config: how to generate; keyword arguments named like its fields override it.
            progress: show a progress bar for a list.
            return_exceptions: put the error of a failed prompt into its slot instead of raising the first.
            options: see CallOptions.

        Raises:
            InvalidRequestError: prompt or config are wrong; nothing was sent.
            RequestTimeoutError: the deadline passed; ``partial`` holds what was generated.
            LMBridgeError: what else may happen to a request; see the guide. For a list the first error is raised,
                with its position as ``index``, and the rest is aborted.
        """
        client = self._client()
        if not isinstance(prompt, str) and is_batch(prompt):
            return client.run_batch(prompt, config, options, return_exceptions, progress)
        return client.run(client.request(prompt, config, options))

    def stream(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> Stream:
        """Submit one prompt and return its deltas as they come; leaving the stream aborts. Raises as ``infer`` does."""
        client = self._client()
        return client.open_stream(client.request(prompt, config, options), self)

    def stream_many(
        self,
        prompts: Prompts,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        **options: Unpack[CallOptions],
    ) -> StreamGroup:
        """Submit a list of prompts and return their deltas with their indices as they come, in one iteration.

        The same prompt several times gives several answers to it; ``config`` may be a list, one for each. A
        ``request_id`` has ``-0``, ``-1`` … put behind it. Raises as ``infer`` does; nothing runs then.
        """
        client = self._client()
        return client.open_group(client.requests(prompts, config, options), self)

    def submit(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseFuture:
        """Submit one prompt and return a ``concurrent.futures.Future`` of its Response; what is wrong raises here."""
        client = self._client()
        return client.open_future(client.request(prompt, config, options), self)

    @overload
    async def ainfer(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> Response: ...

    @overload
    async def ainfer(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> list[Response]: ...

    @overload
    async def ainfer(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        *,
        return_exceptions: Literal[True],
        **options: Unpack[CallOptions],
    ) -> list[Result]: ...

    async def ainfer(
        self,
        prompt: Any,
        config: GenerationConfig | None = None,
        *,
        return_exceptions: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """``infer`` for a task on any other event loop; cancelling the task aborts."""
        client = self._client()
        if is_batch(prompt):
            return await client.run_batch_async(prompt, config, options, return_exceptions, self)
        return await client.run_async(client.request(prompt, config, options), self)

    def astream(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncStream:
        """``stream`` for a task on any other event loop: ``async for delta in bridge.astream(prompt)``.

        What is wrong raises here; the request is sent by the first delta asked for, or by ``await bridge.astream(…)``.
        """
        client = self._client()
        return client.open_async_stream(client.request(prompt, config, options), self)
