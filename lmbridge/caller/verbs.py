"""The verbs, written once and shared by Bridge and Client: infer, stream, stream_many, submit, ainfer, astream.

Rule: signatures and documentation only; the neighbouring modules do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from lmbridge.caller.answer import answer
from lmbridge.caller.async_streams import AsyncStream
from lmbridge.caller.batch import Batch, Result, progress_bar
from lmbridge.caller.futures import ResponseFuture
from lmbridge.caller.job_verbs import JobVerbs
from lmbridge.caller.options import CallOptions
from lmbridge.caller.prompts import is_batch
from lmbridge.caller.requests import make_list, make_request
from lmbridge.caller.stream_group import StreamGroup
from lmbridge.caller.streams import Stream
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import GenerationConfig, Message, Response

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompts = list[str] | list[list[Message]] | list[list[int]]


class Verbs(JobVerbs):
    """infer, stream, stream_many and submit for threads; ainfer and astream for other event loops."""

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
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        progress: bool = False,
        return_exceptions: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> list[Response]: ...

    @overload
    def infer(
        self,
        prompt: Prompts,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        progress: bool = False,
        return_exceptions: Literal[True],
        **options: Unpack[CallOptions],
    ) -> list[Result]: ...

    def infer(
        self,
        prompt: Any,
        config: Any = None,
        *,
        progress: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Generate and block for the complete answer; a list of prompts gives a list of answers in order.

        Args:
            prompt: a string, a conversation (list of messages), token ids, or a list of these.
            config: how to generate; keyword arguments named like its fields override it. For a list of prompts it may
                be a list, one config per prompt.
            progress: show a progress bar for a list.
            return_exceptions: put errors into their slots instead of raising the first.
            options: see CallOptions.

        Raises:
            InvalidRequestError: prompt or config is invalid; nothing was sent.
            RequestTimeoutError: the deadline passed; ``partial`` holds the text generated so far.
            LMBridgeError: anything else that may happen to a request; see the guide. For a list the first error is
                raised, with its position as ``index``, and the rest is aborted.
        """
        account = self._account()
        if isinstance(prompt, str) or not is_batch(prompt):
            return answer(account, make_request(account, prompt, config, options))
        requests = make_list(account, prompt, config, options, return_exceptions)
        with progress_bar(len(requests), progress) as advance:
            return Batch(account, return_exceptions, advance).run(requests)

    def stream(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> Stream:
        """Submit one prompt and return its deltas as they come; leaving the stream aborts. Raises as ``infer``."""
        account = self._account()
        return Stream(account, make_request(account, prompt, config, options), self)

    def stream_many(
        self,
        prompts: Prompts,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **options: Unpack[CallOptions],
    ) -> StreamGroup:
        """Submit a list of prompts and return their deltas, each with its prompt's index, in one iteration.

        Repeat a prompt to get several answers to it; ``config`` may be a list, one per prompt. A ``request_id`` gets
        ``-0``, ``-1`` … appended. Raises as ``infer``; nothing runs then. With ``return_exceptions`` an invalid prompt
        gives a delta with its error instead, and the others run.
        """
        account = self._account()
        if isinstance(prompts, str) or not is_batch(prompts):
            raise InvalidRequestError("stream_many takes a list of prompts; use stream for one.", "prompts")
        return StreamGroup(account, make_list(account, prompts, config, options, return_exceptions), self)

    def submit(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseFuture:
        """Submit one prompt and return the future of its Response; invalid arguments raise immediately."""
        account = self._account()
        return ResponseFuture(account, make_request(account, prompt, config, options), self)

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
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> list[Response]: ...

    @overload
    async def ainfer(
        self,
        prompt: Prompts,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        return_exceptions: Literal[True],
        **options: Unpack[CallOptions],
    ) -> list[Result]: ...

    async def ainfer(
        self,
        prompt: Any,
        config: Any = None,
        *,
        return_exceptions: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """``infer`` for a task on another event loop; cancelling the task aborts it."""
        account = self._task_account()
        if not isinstance(prompt, str) and is_batch(prompt):
            requests = make_list(account, prompt, config, options, return_exceptions)
            return await Batch(account, return_exceptions).run_async(requests)
        return await AsyncStream(account, make_request(account, prompt, config, options), self, streaming=False).whole()

    def astream(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncStream:
        """``stream`` for a task on another event loop: ``async for delta in bridge.astream(prompt)``.

        Invalid arguments raise immediately; the first delta, or ``await bridge.astream(…)``, sends the request.
        """
        account = self._task_account()
        return AsyncStream(account, make_request(account, prompt, config, options), self)
