"""The llama.cpp engine: its server runs in this process, with one thread of ours per slot.

Rule: everything here runs on the server thread, except where a docstring says otherwise. xllamacpp is imported when the
engine starts and no earlier.

A call into llama.cpp blocks its thread and can end early only when the callback says so at the next message. So each
slot has a thread, a request waits for a free one, and a slot is free again once its call has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from lmbridge.engines.base import Engine, Library, engine_error
from lmbridge.engines.llamacpp import library
from lmbridge.engines.llamacpp.asking import Asked, asked_of
from lmbridge.engines.llamacpp.calls import Bell, Call
from lmbridge.engines.llamacpp.jobs import done
from lmbridge.engines.llamacpp.loading import Model, load
from lmbridge.engines.llamacpp.options import LlamaCppOptions
from lmbridge.engines.llamacpp.reading import Reading
from lmbridge.engines.models import GGUF, find_model
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineDeadError, EngineStartError, InvalidRequestError, LMBridgeError, ModelNotFoundError
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, Embed, GenerationConfig, Job, Request, Rerank, Task

CLOSE_TIMEOUT = 3.0
"""Seconds to wait on closing for calls to return, and again for the model to be freed; then they are left behind."""
_PROOF = 3  # tokens


class LlamaCppEngine(Engine):
    """A GGUF model under llama.cpp.

    Args:
        model: a ``.gguf`` file, or a folder with one.
        task: ``"generate"``, ``"embed"`` or ``"rerank"``; by default what the file says.
        max_batch_size: requests in a step: llama.cpp's slots.
        max_chunk_size: prompt tokens in a step. An abort takes effect at the end of such a step.
        max_context: the most tokens of prompt and answer together, rounded up to a multiple of 256; at most what the
            model was trained for, default: up to 4,096. Memory for ``max_batch_size`` times this is allocated at once.
        threads: compute threads; default: one per core.
        gpu_layers: layers to put on a GPU, if xllamacpp was built for it; default: as many as fit.
    """

    name: ClassVar[str] = "llamacpp"
    libraries = (Library("xllamacpp", library.TRIED, library.INSTALL),)
    supports: ClassVar[frozenset[str]] = frozenset(
        {
            "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
            "random_seed", "stop_words", "include_stop_str_in_output", "stop_token_ids", "ignore_eos", "logprobs",
            "logit_bias", "response_format", "grammar", "chat_template_kwargs", "add_generation_prompt",
            "continue_final_message", "tools", "tool_choice", "parallel_tool_calls", "separate_reasoning",
        }
    )  # fmt: skip

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        task: str = "auto",
        max_batch_size: int = 8,
        max_chunk_size: int = 256,
        max_context: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
    ) -> None:
        self._label, path = os.fspath(model), find_model(model)
        if not path.lower().endswith(GGUF):
            raise ModelNotFoundError(
                f"llama.cpp needs a {GGUF} file, and {self._label!r} is not one; give one, or use another engine."
            )
        self._options = LlamaCppOptions(path, task, max_batch_size, max_chunk_size, max_context, threads, gpu_layers)
        self.max_batch_size = max_batch_size
        if task != "auto":
            self.tasks = frozenset({task})  # type: ignore[arg-type]  # it is one of them
        self._loader = EngineThread("lmbridge llamacpp")
        self._slots = [EngineThread(f"lmbridge llamacpp slot {number}") for number in range(max_batch_size)]
        # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
        for thread in (self._loader, *self._slots):
            weakref.finalize(self, thread.close).atexit = False
        self._free: asyncio.Queue[EngineThread] = asyncio.Queue()
        self._model: Model | None = None
        self._loaded: list[Model] = []  # the same; worker thread only
        self._calls: dict[str, Call] = {}  # request id -> its call, while it is in llama.cpp
        self._working: set[asyncio.Task[Any]] = set()  # calls that have not returned
        self._texts: dict[int, str] = {}  # of tokens that were told
        self._tokens = 0
        self._last_word = 0.0  # monotonic

    def describe(self) -> str:
        return f"{self._label} on llama.cpp" + (f" ({self._model.header.architecture})" if self._model else "")

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and send it a first request.

        Raises:
            MissingDependencyError: xllamacpp is missing, or has changed; the message names what.
            ModelNotFoundError: the file is not a GGUF file.
            EngineStartError: llama.cpp cannot load the model, or its first request fails.
        """
        self._bell = Bell()
        self._model = model = await self._loader.run(self._load)
        task: Task = model.task  # type: ignore[assignment]  # it is one of them
        self.tasks = frozenset({task})
        for slot in self._slots:
            self._free.put_nowait(slot)
        try:
            await self._prove(task)
        except LMBridgeError as cause:
            raise EngineStartError(f"{self.describe()} cannot {task}: {cause}") from cause

    def _load(self) -> Model:
        """On the worker thread. The model is stored at once: the awaiting task may be cancelled."""
        self._loaded.append(load(self._options))
        return self._loaded[0]

    async def _prove(self, task: Task) -> None:
        jobs: dict[Task, Job | None] = {"embed": Embed("proof"), "rerank": Rerank("proof", "a proof")}
        config = GenerationConfig(max_new_tokens=_PROOF)
        now, context = time.monotonic(), contextvars.copy_context()
        request = Request("proof", "proof", config, True, "", 0, None, now, context, jobs.get(task))
        last = None
        async with contextlib.aclosing(self.generate(request)) as deltas:
            async for delta in deltas:
                last = delta
        if last is None or last.finish_reason is None:
            raise EngineStartError("it answered nothing")

    async def close(self) -> None:
        await super().close()
        model, self._model = self._model, None
        try:
            if self._working:
                await asyncio.wait(self._working, timeout=CLOSE_TIMEOUT)
            if self._working and model is not None:
                logger.warning("llama.cpp does not return from a call; the call and its model are left behind.")
                model.server = None  # the last call to return frees it
            else:
                del model
                await asyncio.wait_for(self._loader.run(self._unload), CLOSE_TIMEOUT)
        except TimeoutError:
            logger.warning("llama.cpp did not free %s within %g s; it is left behind.", self._label, CLOSE_TIMEOUT)
        finally:
            for thread in (self._loader, *self._slots):
                thread.close()

    def _unload(self) -> None:
        """On the worker thread. Freeing waits for llama.cpp's step while holding the GIL; this request does not."""
        while self._loaded:
            self._loaded[-1].server.handle_metrics()
            self._loaded.pop()

    # --------------------------------------------------------------------------------------------------------- requests

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the request's deltas; its slot is free once the last one arrives.

        Raises:
            InvalidRequestError: we or llama.cpp refuse the prompt or an option.
            PromptTooLongError: there is no room for the prompt and one more token.
            EngineError: llama.cpp failed this request.
        """
        model, slot = self._alive(), await self._free.get()
        if request.job is not None:
            work = self._begun(slot, done, request.job, model)
            await asyncio.wait([work])
            yield self._result(work)
            return
        call = self._calls[request.id] = Call(self._bell)
        work = self._begun(slot, _answer, request, model, call)
        work.add_done_callback(lambda _: call.news.set())
        reading = Reading(request.config, self._texts)
        try:
            while not reading.stopped and (words := await self._heard(call, work)):
                reading.form = call.form
                delta = reading.take(words)
                if delta is not None:
                    yield delta
            last = reading.finish()
        finally:
            call.stop()
            if not work.done():
                await asyncio.wait([work])
            self._tokens += reading.tokens
            if self._calls.get(request.id) is call:
                del self._calls[request.id]
        yield last

    async def _heard(self, call: Call, work: asyncio.Task[Any]) -> list[dict[str, Any]]:
        """All messages available; empty once the call has returned."""
        words = await call.words(work)
        self._last_word = time.monotonic()
        if not words:
            self._result(work)
        return words

    def _begun(self, slot: EngineThread, function: Any, *args: Any) -> asyncio.Task[Any]:
        """The call on the slot's thread; the slot is free once it has returned."""
        work = asyncio.get_running_loop().create_task(slot.run(function, *args))
        self._working.add(work)
        work.add_done_callback(functools.partial(self._back, slot))
        return work

    def _back(self, slot: EngineThread, work: asyncio.Task[Any]) -> None:
        self._working.discard(work)
        self._free.put_nowait(slot)
        if not work.cancelled():
            work.exception()  # retrieved: the aborting caller does not ask

    def _result(self, work: asyncio.Task[Any]) -> Any:
        try:
            return work.result()
        except LMBridgeError:
            raise
        except Exception as cause:
            raise _failed(cause) from cause

    def _alive(self) -> Model:
        if self._model is None:
            raise EngineDeadError("The llama.cpp engine is not running; it takes no requests.")
        return self._model

    # -------------------------------------------------------------------------------------------------------- questions

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [self._texts.get(token, "") for token in token_ids]

    def progress(self, request_id: str) -> int | None:
        call = self._calls.get(request_id)
        return None if call is None else call.heard

    def where(self) -> str:
        calls = len(self._calls)
        if not calls:
            return ""
        return f"{calls} calls are in llama.cpp, which last responded {time.monotonic() - self._last_word:.1f} s ago"

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``tokens``, and how many slots are ``free``."""
        return {**super().stats(), "tokens": float(self._tokens), "free": float(self._free.qsize())}


def _answer(request: Request, model: Model, call: Call) -> None:
    """The whole call, on a slot's thread: translating a long prompt or a schema is slow."""
    asked: Asked = asked_of(request, model)
    call.form = asked.form
    handle = model.server.handle_chat_completions if asked.chat else model.server.handle_completions
    try:
        call.make(handle, asked.body)
    except (RuntimeError, ValueError) as cause:  # what llama.cpp raises for an invalid request
        if call.heard:
            raise
        reason = str(cause).rpartition("Jinja Exception: ")[2].strip()  # for a template, its own message
        raise InvalidRequestError(f"llama.cpp refused the request: {reason}", "prompt") from cause


def _failed(cause: Exception) -> LMBridgeError:
    """The error of a call that ended for an external reason, such as the end of its thread; retryable."""
    error = engine_error(f"The call into llama.cpp ended: {shown(cause)}.", cause)
    error.retryable = True
    return error
