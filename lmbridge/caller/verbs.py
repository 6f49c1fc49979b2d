"""The verbs, written once and shared by Bridge and Client: infer, stream, stream_many, submit, ainfer, astream.

Rule: signatures and their promises only; what they are made of stands beside.
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
        """Generate and block for the whole answer; a list of prompts gives a list of answers in the same order.

        Args:
            prompt: a text, a conversation (list of messages), token ids, or a list of these.
            config: how to generate; keyword arguments named like its fields override it. A list of prompts may have
                a list of them, one for each.
            progress: show a progress bar for a list.
            return_exceptions: put the error of a failed prompt into its slot instead of raising the first.
            options: see CallOptions.

        Raises:
            InvalidRequestError: prompt or config are wrong; nothing was sent.
            RequestTimeoutError: the deadline passed; ``partial`` holds what was generated.
            LMBridgeError: what else may happen to a request; see the guide. For a list the first error is raised,
                with its position as ``index``, and the rest is aborted.
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
        """Submit one prompt and return its deltas as they come; leaving the stream aborts. Raises as ``infer`` does."""
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
        """Submit a list of prompts and return their deltas with their indices as they come, in one iteration.

        The same prompt several times gives several answers to it; ``config`` may be a list, one for each. A
        ``request_id`` has ``-0``, ``-1`` … put behind it. Raises as ``infer`` does; nothing runs then. With
        ``return_exceptions`` a wrong prompt is a delta with that error instead, and the others run.
        """
        account = self._account()
        if isinstance(prompts, str) or not is_batch(prompts):
            raise InvalidRequestError("stream_many takes a list of prompts; stream takes one.", "prompts")
        return StreamGroup(account, make_list(account, prompts, config, options, return_exceptions), self)

    def submit(
        self,
        prompt: str | list[Message] | list[int],
        config: GenerationConfig | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseFuture:
        """Submit one prompt and return a ``concurrent.futures.Future`` of its Response; what is wrong raises here."""
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
        """``infer`` for a task on any other event loop; cancelling the task aborts."""
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
        """``stream`` for a task on any other event loop: ``async for delta in bridge.astream(prompt)``.

        What is wrong raises here; the request is sent by the first delta asked for, or by ``await bridge.astream(…)``.
        """
        account = self._task_account()
        return AsyncStream(account, make_request(account, prompt, config, options), self)
