"""The LMDeploy engine: its async engine on the server's own loop, PyTorch or TurboMind below.

Rule: everything here runs on the server thread, except where a docstring says otherwise. LMDeploy is imported when the
engine starts and no earlier.

LMDeploy swallows a task's cancellation, and ignores an abort of a request that is still waiting for a place. So
requests are ended only by ``async_abort``, there are never more of them than LMDeploy has places, and one counts as
ended when LMDeploy's generator has finished and its place is free again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

from lmbridge.engines.answer import Answer
from lmbridge.engines.base import Engine, Library
from lmbridge.engines.dialect import Dialect
from lmbridge.engines.lmdeploy.faults import named_errors
from lmbridge.engines.lmdeploy.loading import load
from lmbridge.engines.lmdeploy.options import LMDeployOptions
from lmbridge.engines.lmdeploy.own import OWN_FIELDS, LMDeployRequestConfig
from lmbridge.engines.lmdeploy.preparing import Preparer
from lmbridge.engines.lmdeploy.sampling import check_ranges, own_stop_ids
from lmbridge.engines.lmdeploy.scoring import score
from lmbridge.engines.lmdeploy.told import Told
from lmbridge.engines.lmdeploy.watch import CLOSE_TIMEOUT, Watch, within
from lmbridge.engines.models import find_model
from lmbridge.engines.text import Vocabulary
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineDeadError, InvalidRequestError
from lmbridge.messages import Delta, FinishReason, Request, Usage


class LMDeployEngine(Engine):
    """A model under LMDeploy, by its PyTorch engine or by TurboMind.

    Args:
        model: ``"demo"``, a folder, or a hub id.
        backend: ``"pytorch"``, ``"turbomind"``, or None for LMDeploy's choice: TurboMind if it supports the model.
        backend_config: LMDeploy's own ``PytorchEngineConfig`` or ``TurbomindEngineConfig`` instead of the options
            from ``device`` to ``revision``. Log-probabilities need ``logprobs_mode="raw_logprobs"`` in the former.
        device: LMDeploy's ``device_type``: ``"cuda"`` (default), or with the PyTorch engine ``"ascend"``, ``"maca"``,
            ``"camb"``. CPUs are not supported.
        dtype: ``"auto"``, ``"float16"``, ``"bfloat16"`` or a torch dtype.
        max_batch_size: requests in a step; default: LMDeploy's choice for the device.
        max_chunk_size: prompt tokens in a step.
        max_context: the most tokens of prompt and answer together (``session_len``).
        cache_share: the part of the free memory that the cache may take, in (0, 1).
        page_size: tokens per block of the cache.
        num_blocks: blocks in the cache, instead of ``cache_share``.
        tp: GPUs to spread the model over.
        revision: branch, tag or commit on the hub.
        chat_template_config: LMDeploy's ``ChatTemplateConfig``; default: the model's own template.
        trust_remote_code: run code that comes with the model.
        log_level: of LMDeploy's logger, which the whole process shares.
    """

    name: ClassVar[str] = "lmdeploy"
    libraries = (Library("lmdeploy", "0.16 to 0.18", 'pip install "lmbridge[lmdeploy]"'),)
    supports: ClassVar[frozenset[str]] = frozenset(
        {
            "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p",
            "repetition_penalty", "random_seed", "stop_words", "include_stop_str_in_output", "stop_token_ids",
            "ignore_eos", "skip_special_tokens", "logprobs", "response_format", "grammar",
            "chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls", "separate_reasoning",
            "return_prompt_token_ids", *OWN_FIELDS,
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
        # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
        weakref.finalize(self, self._thread.close).atexit = False
        self._started = False
        self._core: Any = None  # LMDeploy's AsyncEngine
        self._loaded: Any = None  # the same; worker thread only
        self._watch: Watch | None = None
        self._sessions: dict[str, Any] = {}  # request id -> LMDeploy's session, while it generates
        self._aborted: set[str] = set()  # request ids
        self._aborts: set[asyncio.Task[None]] = set()
        self._tokens = 0
        self._dead: BaseException | None = None
        self._where = ""

    def describe(self) -> str:
        return f"{self._label} on LMDeploy{self._where}"

    @property
    def backend_config(self) -> Any:
        """LMDeploy's resolved config; None while no engine is loaded. Any thread."""
        core = self._core
        return core.backend_config if core is not None else None

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and start LMDeploy's loop here.

        Raises:
            MissingDependencyError: LMDeploy is missing, too old, or has changed; the message names what.
            EngineStartError: LMDeploy called ``exit``, as its environment checks do.
            Exception: whatever else LMDeploy raises while loading the model.
        """
        self._started = True
        core = await self._thread.run(self._load)
        core.start_loop(asyncio.get_running_loop(), use_async_api=True)
        self._core = core
        self._watch = Watch(core, self._die)
        self._vocabulary = Vocabulary(core.tokenizer.model.model)
        self._dialect = Dialect(core.tokenizer.model.model, spells=False)
        self._preparer = Preparer(core, self._dialect, self._die)
        self.max_batch_size = core.session_mgr.request_handle_pool.size
        self._where = f" ({core.backend})"

    def _load(self) -> Any:
        """On the worker thread. The engine is stored at once: the awaiting task may be cancelled."""
        self._loaded = load(self._options)
        return self._loaded

    def _die(self, cause: BaseException) -> None:
        if self._core is not None and self._dead is None:
            self._dead = cause
            self.on_death(cause)

    async def close(self) -> None:
        self._core = None  # from here on its end is not a death
        watch, self._watch = self._watch, None
        started, self._started = self._started, False
        try:
            if watch is not None:
                await self._stop(watch)
            if started:
                await self._thread.run(self._unload, watch is not None)
        finally:
            self._thread.close()

    async def _stop(self, watch: Watch) -> None:
        """End the requests in the way LMDeploy supports, then its loop. What does not end is logged and left behind."""
        for request_id in list(self._running):
            self.abort_request(request_id)
        await within(CLOSE_TIMEOUT, "requests", self._running.values())
        await within(CLOSE_TIMEOUT, "aborts", self._aborts)
        await watch.end(self._thread)

    def _unload(self, stopped: bool) -> None:
        """On the worker thread: free what was loaded, even after an aborted start."""
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
        """Yield the request's deltas; LMDeploy has released the request when the last one arrives.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know.
            PromptTooLongError: there is no room for it and one more token.
            EngineError: LMDeploy failed this request.
            EngineDeadError: the engine takes no more requests.
        """
        session = None
        try:
            core, config = self._alive(), request.config
            if isinstance(config, LMDeployRequestConfig) and config.score is not None:
                yield await self._score(core, request, config.score)
                return
            prepared = await self._preparer.prepare(request)
            ids = prepared.inputs["input_ids"]
            answer = Answer(config, self._vocabulary, ids, self._dialect, own_stop_ids(config))
            if request.id in self._aborted:
                core.session_mgr.remove(prepared.session)
                yield answer.finish("abort")
                return
            session = self._sessions[request.id] = prepared.session
            told = Told(config, ids)
            reason = None
            with named_errors(self._die):
                async with contextlib.aclosing(core.generate(prepared, stream_response=True)) as outputs:
                    async for out in outputs:
                        if out.finish_reason is not None:
                            reason = out.finish_reason
                        token_ids = told.take(out)
                        self._tokens += len(token_ids)
                        delta = answer.take(token_ids, out.logprobs)
                        if answer.stopped and reason is None:
                            self.abort_request(request.id)
                        if delta is not None:
                            yield told.with_prompt(delta)
            if reason is not None:
                yield told.with_rest(answer.finish(reason))
        finally:
            if self._sessions.get(request.id) is session:  # the id may be in use again
                self._sessions.pop(request.id, None)
                self._aborted.discard(request.id)

    async def _score(self, core: Any, request: Request, kind: Literal["ppl", "reward"]) -> Delta:
        ids = self._preparer.ids(request.prompt)
        with named_errors(self._die):
            value = await score(core, kind, ids)
        reason: FinishReason = "abort" if request.id in self._aborted else "stop"
        return Delta(value=value, finish_reason=reason, usage=Usage(len(ids), 0))

    def _tell_abort(self, session: Any) -> None:
        task = asyncio.get_running_loop().create_task(session.async_abort(), name="lmbridge abort")
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _alive(self) -> Any:
        if self._dead is not None or self._core is None:
            state = "has died" if self._dead is not None else "is not running"
            raise EngineDeadError(f"The LMDeploy engine {state}; it takes no requests.") from self._dead
        return self._core

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._vocabulary.texts(token_ids)

    def stats(self) -> dict[str, float]:
        """``in_flight`` and ``tokens``; ``running``, ``waiting``, ``steps`` and ``cache_free`` are LMDeploy's own.

        An LMDeploy engine process reports its counters only to a blocking call, so they are then left out.
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
