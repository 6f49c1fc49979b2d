"""The transformers engine: many requests at once on one model, by the runner that fits it.

Rule: everything here runs on the server thread, except where a docstring says otherwise. torch and transformers are
imported when the engine starts and no earlier.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lmbridge.engines.base import Engine, Library, Sink, engine_error
from lmbridge.engines.models import announce, find_model
from lmbridge.engines.text import Piece
from lmbridge.engines.thread import EngineThread
from lmbridge.engines.transformers.library import PIP, TRIED
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.running import Running
from lmbridge.errors import EngineDeadError, LMBridgeError, UnsupportedOptionError
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Request

if TYPE_CHECKING:
    from lmbridge.engines.transformers.starting import Core, Start


class TransformersEngine(Engine):
    """A Hugging Face causal language model, by default under transformers' continuous batching.

    Args:
        model: ``"demo"``, a folder, a ``.gguf`` file, or a hub id.
        runner: ``"paged"``, transformers' continuous batching; ``"plain"``, which runs requests in turns and supports
            every causal language model; ``"auto"``, paged if it passes the self-check.
        self_check: end loading by comparing some answers with the model's own.
        generation_defaults: ``"model"``: requests that sample without settings of their own use those recommended by
            the model's author; ``"none"``: they do not.
        device: a torch name; default: ``"cuda"`` if available, else ``"cpu"``.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype;
            default: float32 on a CPU, as stored elsewhere.
        attn_implementation: one of transformers' names; default: the fastest available.
        max_batch_size: requests in a step.
        max_chunk_size: prompt tokens in a step; longer prompts take several.
        max_context: the most tokens of prompt and answer together, if the model allows more.
        cache_share: the part of the free memory that the cache may take, in (0, 1). Default on a GPU: 0.8; on a CPU: a
            tenth, at most 2 GiB, and less if a full batch of full contexts needs less.
        page_size: tokens per page of the cache.
        num_blocks: pages in the cache, instead of ``cache_share``.
        threads: torch's threads for a step on a CPU, for this engine only; default: one for models under 4 million
            parameters, else torch's own choice.
        cuda_graphs: let transformers record steps as CUDA graphs; requests for logprobs and prompt_logprobs are then
            refused.
        trust_remote_code: run code that comes with the model.
        revision: branch, tag or commit on the hub.
    """

    name: ClassVar[str] = "transformers"
    libraries = (Library("torch", "2.6 to 2.13", "pip install torch"), Library("transformers", TRIED, PIP))
    supports: ClassVar[frozenset[str]] = frozenset(GenerationConfig().__dict__)

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        runner: str = "auto",
        self_check: bool = True,
        generation_defaults: str = "model",
        device: str | None = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        max_batch_size: int = 64,
        max_chunk_size: int | None = None,
        max_context: int | None = None,
        cache_share: float | None = None,
        page_size: int | None = None,
        num_blocks: int | None = None,
        threads: int | None = None,
        cuda_graphs: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self._label = os.fspath(model)
        self._options = ModelOptions(
            model=find_model(model),
            runner=runner,
            self_check=self_check,
            generation_defaults=generation_defaults,
            device=None if device is None else str(device),
            dtype=dtype,
            attn_implementation=attn_implementation,
            max_batch_size=max_batch_size,
            max_chunk_size=max_chunk_size,
            max_context=max_context,
            cache_share=cache_share,
            page_size=page_size,
            num_blocks=num_blocks,
            threads=threads,
            cuda_graphs=cuda_graphs,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        self.max_batch_size = max_batch_size
        self._thread = EngineThread("lmbridge transformers")
        # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
        weakref.finalize(self, self._thread.close).atexit = False
        self._start: Start | None = None
        self._core: Core | None = None
        self._requests: dict[str, Running] = {}  # by key
        self._keys: dict[str, str] = {}  # request id -> key
        self._numbers = itertools.count()
        self._encoding: set[asyncio.Task[None]] = set()  # long prompts on the worker thread
        self._tokens = 0
        self._dead: BaseException | None = None
        self._proved = False

    @property
    def runner(self) -> str:
        """``"paged"`` or ``"plain"``; "" before the model is loaded. Any thread."""
        core = self._core
        return core.runner.name if core is not None else ""

    @property
    def device(self) -> str | None:
        """The device that was requested, or None. Any thread."""
        return self._options.device

    def describe(self) -> str:
        core = self._core
        return f"{self._label} on transformers" + (f" ({core.describe()})" if core is not None else "")

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and check its answers.

        Raises:
            MissingDependencyError: a package is missing or too old.
            EngineStartError: transformers has changed, this engine cannot run the model, or its answers differ from the
                model's own.
            Exception: whatever transformers raises while loading, out of memory included.
        """
        self._loop = asyncio.get_running_loop()
        start = self._start = await self._thread.run(_begin, self._options, self._label)
        for attempt in await self._thread.run(start.load):
            fault = await self._attempt(start, attempt)
            if not fault:
                self._proved = True
                start.succeeded(attempt)
                return
            self._core = None
            await self._thread.run(start.failed, attempt, fault)
        raise start.error()

    async def _attempt(self, start: Start, attempt: Any) -> str:
        """Put the model on a runner; returns what is wrong with its answers there, or ""."""
        from lmbridge.engines.transformers import library
        from lmbridge.engines.transformers.runner import Listener

        try:
            with library.quiet():
                core = self._core = await self._thread.run(start.build, attempt)
                if not self._options.cuda_graphs:  # steps that are replayed from a graph call no hook
                    core.runner.take_turns(self.party)
                listener = Listener(self._on_tokens, self._on_failure, self._on_end)
                await self._thread.run(core.runner.start, self._loop, listener)
                if start.proof is None:
                    return ""
                return await start.proof.ask(self.add_request, logprobs=not self._options.cuda_graphs)
        except Exception as cause:
            self._requests.clear()  # the other self-check request may still be inside
            self._keys.clear()
            fault = start.let_go(cause)
            if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
                raise  # another runner would not be what was requested
            return fault

    async def close(self) -> None:
        for task in self._encoding:
            task.cancel()
        self._requests.clear()
        self._keys.clear()
        self._core = None
        self._proved = False
        start, self._start = self._start, None
        try:
            if start is not None:
                await self._thread.run(start.unload, self._dead)
        finally:  # callers of a hanging step can stop waiting
            self._thread.close()

    # --------------------------------------------------------------------------------------------------------- requests

    def add_request(self, request: Request, sink: Sink) -> None:
        """Begin the request; an invalid prompt raises at once if it is short, and fails in the sink if it is long.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know.
            PromptTooLongError: there is no room for it and one more token.
            EngineDeadError: the engine takes no more requests.
        """
        core = self._alive()
        running = self._new_running(request, sink, core)
        held = core.dialect.holds(request.config)
        token_ids = None if held else core.encoder.at_once(request.prompt, request.raw, request.config)
        if token_ids is not None:
            try:
                self._submit(running, token_ids)
            except Exception:
                self._forget(running)
                raise
            return
        self._remember(running)
        task = self._loop.create_task(self._encode_and_submit(running))
        self._encoding.add(task)
        task.add_done_callback(self._encoding.discard)

    def abort_request(self, request_id: str) -> None:
        key = self._keys.get(request_id)
        if key is None:
            return
        running = self._requests[key]
        self._cancel(running)
        self._end(running, "abort")

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        core = self._core
        return core.vocabulary.texts(token_ids) if core is not None else super().token_texts(token_ids)

    def check(self, request: Request) -> None:
        super().check(request)
        for name in ("logprobs", "prompt_logprobs", "response_format", "grammar", "tools"):
            if self._options.cuda_graphs and getattr(request.config, name) is not None:
                raise UnsupportedOptionError(f"{name} needs an engine with cuda_graphs=False.", param=name)

    def progress(self, request_id: str) -> int | None:
        """How many steps the request took part in, including those reading its prompt; a clock while the prompt is
        being tokenised, which shows no progress, or while others have the device.
        """
        running = self._requests.get(self._keys.get(request_id, ""))
        if running is None:
            return None
        if not running.prompt_tokens or getattr(self.party, "waiting", False):
            return time.monotonic_ns()
        core = self._core
        return core.runner.steps if core is not None and core.runner.waits(running.key) else running.plan.steps

    def where(self) -> str:
        core = self._core
        return core.runner.where() if core is not None else ""

    def estimate(self) -> int | None:
        """Bytes of the weights once loaded, and of the cache; None for a model not yet downloaded."""
        from lmbridge.engines.transformers import memory

        return memory.needed(self._options)

    def footprint(self) -> int | None:
        core = self._core
        return core.runner.footprint() if core is not None else None

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``steps`` and ``tokens`` so far, ``max_batch_size``, ``cache_free``, the free share of the
        cache, and ``memory_bytes``: what CUDA has reserved on the device or, on a CPU, what the process uses.
        """
        core = self._core
        held = [running.prompt_tokens + len(running.tokens) for running in self._requests.values()]
        return {
            "in_flight": float(len(held)),
            "steps": float(core.runner.steps) if core else 0.0,
            "tokens": float(self._tokens),
            "max_batch_size": float(self.max_batch_size),
            "cache_free": core.free_share(held) if core else 0.0,
            "memory_bytes": _memory(core.device) if core else 0.0,
        }

    def _alive(self) -> Core:
        if self._dead is not None or self._core is None:
            state = "has died" if self._dead is not None else "is not running"
            raise EngineDeadError(f"The transformers engine {state}; it takes no requests.") from self._dead
        return self._core

    def _new_running(self, request: Request, sink: Sink, core: Core) -> Running:
        config = core.with_defaults(request.config)
        stop_ids = frozenset(config.stop_token_ids or ()) | (frozenset() if config.ignore_eos else core.eos)
        plan = core.plan(config, stop_ids)
        return Running(f"{request.id}#{next(self._numbers)}", request, sink, core.stream(config), stop_ids, plan)

    def _remember(self, running: Running) -> None:
        self._requests[running.key] = running
        self._keys[running.request.id] = running.key

    async def _encode_and_submit(self, running: Running) -> None:
        """Prepare a long prompt or a grammar. The request may be aborted before or during this."""

        def encode() -> list[int] | None:
            if running.key not in self._requests or self._core is None:
                return None
            request, core = running.request, self._alive()
            token_ids = core.encoder.encode(request.prompt, request.raw, request.config)
            form = core.dialect.form(request.config)
            if form is not None:
                running.plan.guide = core.grammars.guide(form, core.dialect.thought_end(request.config, token_ids))
            return token_ids

        try:
            token_ids = await self._thread.run(encode, while_awaited=True)
            if token_ids is not None and running.key in self._requests:
                self._submit(running, token_ids)
        except LMBridgeError as error:
            self._fail(running, error)
        except Exception as cause:
            self._fail(running, engine_error(f"The engine could not begin this request: {cause!r}.", cause))

    def _submit(self, running: Running, token_ids: list[int]) -> None:
        core = self._alive()
        running.prompt_tokens = len(token_ids)
        running.plan.prompt = token_ids
        if core.dialect.reads(running.request.config):
            running.reader = core.dialect.reader(running.request.config, token_ids)
        running.tells_prompt = running.request.config.return_prompt_token_ids or running.plan.reading is not None
        self._remember(running)
        budget = min(running.request.config.max_new_tokens, core.runner.room - len(token_ids))
        core.runner.add(running.key, token_ids, budget, sorted(running.stop_ids), running.plan)

    # ---------------------------------------------------------------------------------- news from the generation thread

    def _on_tokens(self, key: str, tokens: Sequence[int], finished: bool) -> None:
        self._tokens += 1
        running = self._requests.get(key)
        if running is not None and running.plan.failure is not None:
            self._cancel(running)
            self._on_failure(key, running.plan.failure)
        elif running is not None:
            try:
                self._advance(running, tokens, finished)
            except Exception as cause:  # this answer's text or its sink; the others continue
                self._abandon(running, cause)

    def _advance(self, running: Running, tokens: Sequence[int], finished: bool) -> None:
        """Record what the step added to an answer."""
        piece, ended = running.take(tokens, finished)
        if piece.stopped:
            if not finished:
                self._cancel(running)
            self._forget(running)
            running.sink(running.delta(piece, "stop"))
        elif finished:
            self._end(running, "stop" if ended else "length", piece)
        elif piece.text or piece.tokens:
            running.sink(running.delta(piece, None))

    def _end(self, running: Running, reason: FinishReason, last: Piece | None = None) -> None:
        """Send the last delta, with everything held back."""
        self._forget(running)
        rest = running.stream.finish()
        if rest.stopped and reason == "length":
            reason = "stop"
        before = last or Piece("", 0)
        running.sink(running.delta(Piece(before.text + rest.text, before.tokens + rest.tokens), reason))

    def _fail(self, running: Running, error: LMBridgeError) -> None:
        if running.key in self._requests:
            self._forget(running)
            running.sink(Delta(error=error))

    def _abandon(self, running: Running, cause: Exception) -> None:
        self._cancel(running)
        with contextlib.suppress(Exception):  # the sink may fail
            self._fail(running, engine_error(f"The answer could not be delivered: {cause!r}.", cause))

    def _cancel(self, running: Running) -> None:
        """Stop it in the runner, if it got there."""
        if self._core is not None and running.prompt_tokens:
            self._core.runner.cancel(running.key)

    def _forget(self, running: Running) -> None:
        self._requests.pop(running.key, None)
        if self._keys.get(running.request.id) == running.key:
            del self._keys[running.request.id]

    def _on_failure(self, key: str, error: BaseException) -> None:
        running = self._requests.get(key)
        if running is not None:
            if not isinstance(error, LMBridgeError):
                error = engine_error(f"The engine failed this request: {error!r}.", error)
            self._fail(running, error)

    def _on_end(self, error: BaseException) -> None:
        """The runner cannot go on: fail all requests and report the death once.

        During the self-check, only the engine's own requests are inside, and get the error.
        """
        if self._core is None or self._dead is not None:
            return
        if not self._proved:
            for running in list(self._requests.values()):
                self._fail(running, engine_error(f"The generation thread ended: {error!r}.", error))
            return
        self._dead = error
        self._requests.clear()
        self._keys.clear()
        self.on_death(error)


def _memory(device: str) -> float:
    """Bytes held on the device: what CUDA has reserved for this process, or on a CPU all that the process has."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.memory_reserved(device))
    import psutil

    return float(psutil.Process().memory_info().rss)


def _begin(options: ModelOptions, label: str) -> Start:
    """On the worker thread: do the slow imports."""
    announce(options.model)
    from lmbridge.engines.transformers import library

    library.import_library()
    from lmbridge.engines.transformers.starting import Start

    return Start(options, label)
