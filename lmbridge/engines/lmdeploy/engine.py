"""The LMDeploy engine: its async engine on the server's own loop, PyTorch or TurboMind below.

Rule: everything here runs on the server thread, except where a docstring says otherwise. LMDeploy is imported when the
engine starts and no earlier.

LMDeploy swallows a task's cancellation, and an abort of a request that still waits for a place does nothing. So a
request is ended by ``async_abort`` and in no other way, there are never more of them than LMDeploy has places, and one
counts as ended when LMDeploy's generator is through and its place is free again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

from lmbridge.engines.answer import Answer
from lmbridge.engines.base import Engine, Library, engine_error
from lmbridge.engines.dialect import Dialect
from lmbridge.engines.lmdeploy.loading import load, room, vocabulary_size
from lmbridge.engines.lmdeploy.options import LMDeployOptions
from lmbridge.engines.lmdeploy.sampling import check_ranges, own_stop_ids, sampling_fields
from lmbridge.engines.models import find_model
from lmbridge.engines.text import Vocabulary
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import (
    EngineDeadError,
    InvalidRequestError,
    LMBridgeError,
    PromptTooLongError,
)
from lmbridge.messages import Delta, Message, Request

CLOSE_TIMEOUT = 3.0
"""Seconds to wait at the end for each of: LMDeploy's requests, their aborts, its main loop."""
_log = logging.getLogger("lmbridge.engines.lmdeploy")


class LMDeployEngine(Engine):
    """A model under LMDeploy, by its PyTorch engine or by TurboMind.

    Args:
        model: ``"demo"``, a folder, or a hub id.
        backend: ``"pytorch"``, ``"turbomind"``, or None for TurboMind where it knows the model, as LMDeploy chooses.
        backend_config: LMDeploy's own ``PytorchEngineConfig`` or ``TurbomindEngineConfig`` instead of the options
            from ``device`` to ``revision``. log-probabilities need ``logprobs_mode="raw_logprobs"`` in the former.
        device: LMDeploy's ``device_type``: ``"cuda"`` (default), or with the PyTorch engine ``"ascend"``, ``"maca"``,
            ``"camb"``. There is none for CPUs.
        dtype: ``"auto"``, ``"float16"``, ``"bfloat16"`` or a torch dtype.
        max_batch_size: requests in a step; by default what LMDeploy takes for the device.
        max_chunk_size: prompt tokens in a step.
        max_context: the most tokens of prompt and answer together (``session_len``).
        cache_share: the part of the free memory that the cache may take, in (0, 1).
        page_size: tokens per block of the cache.
        num_blocks: blocks in the cache, instead of ``cache_share``.
        tp: GPUs to spread the model over.
        revision: branch, tag or commit on the hub.
        chat_template_config: LMDeploy's ``ChatTemplateConfig``; by default the model's own template.
        trust_remote_code: run code that comes with the model.
        log_level: of LMDeploy's own logger, which belongs to the whole process.
    """

    name: ClassVar[str] = "lmdeploy"
    libraries = (Library("lmdeploy", "0.16 to 0.18", 'pip install "lmbridge[lmdeploy]"'),)
    supports: ClassVar[frozenset[str]] = frozenset(
        {
            "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p",
            "repetition_penalty", "random_seed", "stop_words", "include_stop_str_in_output", "stop_token_ids",
            "ignore_eos", "skip_special_tokens", "logprobs", "response_format", "grammar",
            "chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls", "separate_reasoning",
        }
    )  # fmt: skip

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        backend: str | None = None,
        backend_config: Any = None,
        device: str | None = None,
        dtype: Any = None,
        max_batch_size: int | None = None,
        max_chunk_size: int | None = None,
        max_context: int | None = None,
        cache_share: float | None = None,
        page_size: int | None = None,
        num_blocks: int | None = None,
        tp: int | None = None,
        revision: str | None = None,
        chat_template_config: Any = None,
        trust_remote_code: bool = False,
        log_level: str = "WARNING",
    ) -> None:
        self._label = os.fspath(model)
        self._options = LMDeployOptions(
            model=find_model(model),
            backend=backend,
            backend_config=backend_config,
            device=device,
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_chunk_size=max_chunk_size,
            max_context=max_context,
            cache_share=cache_share,
            page_size=page_size,
            num_blocks=num_blocks,
            tp=tp,
            revision=revision,
            chat_template_config=chat_template_config,
            trust_remote_code=trust_remote_code,
            log_level=log_level,
        )
        if max_batch_size is not None:
            self.max_batch_size = max_batch_size  # LMDeploy's own number of places once it is loaded
        self._thread = EngineThread("lmbridge lmdeploy")
        # An engine whose loop got stuck is never closed. Not at exit, where the bridge closes it and needs the thread.
        weakref.finalize(self, self._thread.close).atexit = False
        self._started = False
        self._core: Any = None  # LMDeploy's AsyncEngine
        self._loaded: Any = None  # the same; worker thread only
        self._main: asyncio.Task[Any] | None = None  # the PyTorch engine's main loop
        self._sentinel: int | None = None  # file descriptor, readable when the engine process has ended
        self._sessions: dict[str, Any] = {}  # request id -> LMDeploy's session, while it generates
        self._aborted: set[str] = set()  # request ids
        self._aborts: set[asyncio.Task[None]] = set()
        self._tokens = 0
        self._dead: BaseException | None = None
        self._where = ""

    def describe(self) -> str:
        return f"{self._label} on LMDeploy{self._where}"

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and start LMDeploy's loop here.

        Raises:
            MissingDependencyError: LMDeploy is missing, too old, or has changed; the message names what.
            EngineStartError: LMDeploy ended the attempt with ``exit``, as its checks of the environment do.
            Exception: what else LMDeploy raises when it cannot load the model.
        """
        self._started = True
        core = await self._thread.run(self._load)
        core.start_loop(asyncio.get_running_loop(), use_async_api=True)
        self._core = core
        self._watch(core)
        self._vocabulary = Vocabulary(core.tokenizer.model.model)
        self._dialect = Dialect(core.tokenizer.model.model, spells=False)
        self._template_stops = list(core.stop_words or ())
        self._room = room(core)
        self._vocabulary_size = vocabulary_size(core)
        self.max_batch_size = core.session_mgr.request_handle_pool.size
        self._where = f" ({core.backend})"

    def _load(self) -> Any:
        """On the worker thread. The engine is kept at once: whoever waits for it may be cancelled."""
        self._loaded = load(self._options)
        return self._loaded

    def _watch(self, core: Any) -> None:
        """Hear of LMDeploy's end at once; its own requests would take a second to notice."""
        manager = getattr(core.engine, "req_manager", None)
        process = getattr(core.engine, "proc", None)
        if manager is not None:
            self._main = manager._loop_task
            self._main.add_done_callback(self._on_main_end)
        elif process is not None:
            self._sentinel = os.dup(process.sentinel)  # LMDeploy reads the other, and a loop knows one reader of each
            asyncio.get_running_loop().add_reader(self._sentinel, self._on_process_end, process)

    def _on_main_end(self, main: asyncio.Task[Any]) -> None:
        error = None if main.cancelled() else main.exception()
        self._die(error or RuntimeError("LMDeploy's main loop ended"))

    def _on_process_end(self, process: Any) -> None:
        self._unwatch()
        process.join(0.2)  # its pipe closes a moment before its code is known
        self._die(RuntimeError(f"LMDeploy's engine process ended with code {process.exitcode}"))

    def _unwatch(self) -> None:
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is not None:
            asyncio.get_running_loop().remove_reader(sentinel)
            os.close(sentinel)

    def _die(self, cause: BaseException) -> None:
        if self._core is not None and self._dead is None:
            self._dead = cause
            self.on_death(cause)

    async def close(self) -> None:
        core, self._core = self._core, None  # from here on its end is no death
        started, self._started = self._started, False
        try:
            if core is not None:
                await self._stop(core)
            if started:
                await self._thread.run(self._unload, core is not None)
        finally:
            self._thread.close()

    async def _stop(self, core: Any) -> None:
        """End the requests the way LMDeploy hears, then its loop. What does not end is named and left behind."""
        for request_id in list(self._running):
            self.abort_request(request_id)
        await _within(CLOSE_TIMEOUT, "requests", self._running.values())
        await _within(CLOSE_TIMEOUT, "aborts", self._aborts)
        self._unwatch()
        if hasattr(core.engine, "proc"):  # its client belongs to the loop; this blocks until the process has ended
            core.close()
            return
        if self._main is None:  # TurboMind knows no loop, and takes its time to free a GPU
            await self._thread.run(core.close)
            return
        manager = core.engine.req_manager
        core.close()
        if core.engine._loop_main is None:  # it has not begun; closing has released everything, and it must not begin
            self._main.cancel()
        await _within(CLOSE_TIMEOUT, "main loop", [self._main])
        sender = manager._sender_wait_task
        manager.stop_loop()
        if sender is not None:
            await _within(CLOSE_TIMEOUT, "sender", [sender])
        self._main = None

    def _unload(self, stopped: bool) -> None:
        """On the worker thread: free what was loaded, also when the start was given up half-way."""
        core, self._loaded = self._loaded, None
        if core is not None and not stopped:  # it never ran on a loop
            core.close()
        del core
        gc.collect()

    # --------------------------------------------------------------------------------------------------------- requests

    def check(self, request: Request) -> None:
        super().check(request)
        check_ranges(request.config)
        if request.config.logprobs is not None and not self._options.tells_logprobs:
            raise InvalidRequestError(
                "logprobs need backend_config.logprobs_mode='raw_logprobs' with LMDeploy's PyTorch engine.",
                param="logprobs",
            )

    def abort_request(self, request_id: str) -> None:
        if request_id not in self._running or request_id in self._aborted:
            return
        self._aborted.add(request_id)
        session = self._sessions.get(request_id)
        if session is not None:
            self._tell_abort(session)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas; LMDeploy has let go of the request when the last one comes.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know.
            PromptTooLongError: there is no room for it and one more token.
            EngineError: LMDeploy failed this request.
            EngineDeadError: the engine takes no requests any more.
        """
        session = None
        try:
            core = self._alive()
            prepared = await self._prepare(core, request)
            answer = Answer(
                request.config,
                self._vocabulary,
                prepared.inputs["input_ids"],
                self._dialect,
                own_stop_ids(request.config),
            )
            if request.id in self._aborted:
                core.session_mgr.remove(prepared.session)
                yield answer.finish("abort")
                return
            session = self._sessions[request.id] = prepared.session
            reason = None
            with self._errors_named():
                async with contextlib.aclosing(core.generate(prepared, stream_response=True)) as outputs:
                    async for out in outputs:
                        reason = out.finish_reason or reason
                        delta = answer.take(out.token_ids or [], out.logprobs)
                        self._tokens += len(out.token_ids or ())
                        if answer.stopped and reason is None:
                            self.abort_request(request.id)
                        if delta is not None:
                            yield delta
            if reason is not None:
                yield answer.finish(reason)
        finally:
            if self._sessions.get(request.id) is session:  # or the id has been given to another meanwhile
                self._sessions.pop(request.id, None)
                self._aborted.discard(request.id)

    async def _prepare(self, core: Any, request: Request) -> Any:
        """LMDeploy's own form of the request: its tokens, and what it makes of the config."""
        from lmdeploy import GenerationConfig as LMDeployConfig

        prompt, ids, config = request.prompt, None, request.config
        if isinstance(prompt, str) and not request.raw and config.calling is not None:
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            if prompt and isinstance(prompt[0], dict):
                prompt = self._dialect.told([_message(message) for message in prompt], config)
            else:
                prompt, ids = None, [self._known(token) for token in prompt]  # type: ignore[assignment]
        session = core.session_mgr.get()
        session.epoch = core.epoch
        with self._errors_named():
            prepared = await core.preprocess(
                messages=prompt,
                session_id=session,
                gen_config=LMDeployConfig(**sampling_fields(config, self._template_stops, self._dialect.form(config))),
                tools=self._dialect.tools(config),
                chat_template_kwargs=dict(config.chat_template_kwargs or {}) or None,
                do_preprocess=not (request.raw and isinstance(prompt, str)),
                input_ids=ids,
            )
        try:
            self._fit(prepared)
        except LMBridgeError:
            core.session_mgr.remove(session)
            raise
        return prepared

    def _fit(self, prepared: Any) -> None:
        """Refuse what would end LMDeploy's loop for everyone, and keep the answer within the room there is."""
        count: int = prepared.input_token_len
        if not count:
            raise InvalidRequestError(
                "The prompt is empty: the tokenizer makes no token of it. Give it some text.", param="prompt"
            )
        if count >= self._room:
            raise PromptTooLongError(
                f"The prompt has {count} tokens; there is room for {self._room}, one of them for the answer. Shorten "
                "it, or raise max_context or cache_share where the model allows it.",
                param="prompt",
                most=self._room,
            )
        prepared.gen_config.max_new_tokens = min(prepared.gen_config.max_new_tokens, self._room - count)

    def _known(self, token: object) -> int:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocabulary_size:
            raise InvalidRequestError(
                f"Token ids of a prompt are ints from 0 to {self._vocabulary_size - 1}, not {token!r:.80}.",
                param="prompt",
            )
        return token

    def _tell_abort(self, session: Any) -> None:
        task = asyncio.get_running_loop().create_task(session.async_abort(), name="lmbridge abort")
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _alive(self) -> Any:
        if self._dead is not None or self._core is None:
            state = "has died" if self._dead is not None else "is not running"
            raise EngineDeadError(f"The LMDeploy engine {state}; it takes no requests.") from self._dead
        return self._core

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """LMDeploy's own errors of a request as ours."""
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        try:
            yield
        except RequestError as error:
            reason = f"{error.message} ({error.__cause__})" if error.__cause__ else error.message
            if error.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED:
                raise PromptTooLongError(f"LMDeploy: {reason}", param="prompt") from error
            if error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED_FEATURE, ErrorCode.PREPROCESS_FAILED):
                raise InvalidRequestError(f"LMDeploy refused the request: {reason}", param="prompt") from error
            if error.code == ErrorCode.ENGINE_UNAVAILABLE:
                self._die(error)
                raise EngineDeadError(f"LMDeploy: {reason}") from error
            raise engine_error(f"LMDeploy failed the request: {reason}", error) from error

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._vocabulary.texts(token_ids)

    def stats(self) -> dict[str, float]:
        """``in_flight`` and ``tokens``; ``running``, ``waiting``, ``steps`` and ``cache_free`` are LMDeploy's own.

        An engine process of LMDeploy's tells its counters only to who waits for it; they are left out then.
        """
        stats = {"in_flight": float(len(self._running)), "tokens": float(self._tokens)}
        tell = getattr(self._core.engine, "get_schedule_metrics", None) if self._core is not None else None
        if tell is not None and not asyncio.iscoroutinefunction(tell):
            metrics = tell()
            stats["running"] = float(metrics.active_seqs)
            stats["waiting"] = float(metrics.waiting_seqs)
            stats["steps"] = float(metrics.scheduler_tick)
            stats["cache_free"] = 1.0 - float(metrics.cache_usage)
        return stats


def _message(message: Any) -> Message:
    """The message, seen to have what a template looks for; LMDeploy would leave it out without a word."""
    spoken = isinstance(message, dict) and isinstance(message.get("role"), str)
    if not spoken or ("content" not in message and len(message) < 3):  # a turn of tool calls has no content
        raise InvalidRequestError(
            f"A message is a dict with 'role' and 'content', not {message!r:.80}.", param="prompt"
        )
    return dict(message)


async def _within(seconds: float, what: str, tasks: Any) -> None:
    """Wait for the tasks, whatever they end with. ``asyncio.wait`` and no timeout inside: LMDeploy swallows those."""
    tasks = set(tasks)
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=seconds)
        if late:
            _log.warning("LMDeploy's %s did not end within %.0f s and are left behind", what, seconds)
