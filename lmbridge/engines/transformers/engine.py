"""The transformers engine: many requests at once on one model, by transformers' own continuous batching.

Rule: everything here runs on the server thread, except where a docstring says otherwise. torch and transformers are
imported when the engine starts and no earlier. The generation thread tells of each step by one call to the loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import itertools
import os
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from lmbridge.engines.base import Engine, EngineThread, Sink, engine_error
from lmbridge.engines.models import find_model
from lmbridge.engines.text import Piece, TextStream, Vocabulary
from lmbridge.engines.transformers.encoding import PromptEncoder, characters
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.running import Running
from lmbridge.errors import (
    EngineDeadError,
    LMBridgeError,
    MissingDependencyError,
    PromptTooLongError,
)
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Request

if TYPE_CHECKING:
    from lmbridge.engines.transformers.continuous import Core, Listener

OLDEST_TRANSFORMERS = (5, 17)
INLINE_CHARACTERS = 8_000
"""A prompt of up to this many characters is tokenised at once; it takes about two milliseconds."""
CLOSE_TIMEOUT = 5.0
"""Seconds to wait at the end for a step that is still running."""


class TransformersEngine(Engine):
    """A Hugging Face causal language model under transformers' continuous batching.

    Args:
        model: ``"demo"``, a folder, or a hub id.
        device: ``"cuda"`` where there is one, else ``"cpu"``.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype;
            by default float32 on a CPU and as stored elsewhere.
        attn_implementation: transformers' name of one; by default the fastest it can use.
        max_batch_size: requests in a step.
        max_chunk_size: prompt tokens in a step; longer prompts take several.
        max_context: the most tokens of prompt and answer together, where the model allows more.
        cache_share: the part of the free memory that the cache may take, in (0, 1). On a CPU a tenth by default, and
            at most 2 GiB, with less where a full batch of full contexts needs less.
        page_size: tokens per page of the cache.
        num_blocks: pages in the cache, instead of ``cache_share``.
        threads: how many threads torch uses for a step on a CPU, for this engine only; by default one for a model of
            fewer than 4 million parameters, else torch's own choice.
        trust_remote_code: run code that comes with the model.
        revision: branch, tag or commit on the hub.
    """

    name: ClassVar[str] = "transformers"
    supports: ClassVar[frozenset[str]] = frozenset(GenerationConfig().__dict__)

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
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
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self._label = os.fspath(model)
        self._options = ModelOptions(
            model=find_model(model),
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
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        self.max_batch_size = max_batch_size
        self._thread = EngineThread("lmbridge transformers")
        self._core: Core | None = None
        self._loaded: Core | None = None  # worker thread only
        self._started = False
        self._requests: dict[str, Running] = {}  # by key
        self._keys: dict[str, str] = {}  # request id -> key
        self._numbers = itertools.count()
        self._encoding: set[asyncio.Task[None]] = set()  # long prompts on the worker thread
        self._unsure: collections.deque[str] = collections.deque(maxlen=4 * max_batch_size)  # see _cancel
        self._tokens = 0
        self._dead: BaseException | None = None
        self._closed = False
        self._where = ""

    def describe(self) -> str:
        return f"{self._label} on transformers{self._where}"

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread.

        Raises:
            MissingDependencyError: a package is missing or too old.
            Exception: what transformers raises when it cannot load the model, or when there is too little memory.
        """
        self._loop = asyncio.get_running_loop()
        self._started = True
        self._core = core = await self._thread.run(self._load)
        self._where = f" ({core.device}, {core.dtype})"
        self._vocabulary = Vocabulary(core.tokenizer)
        self._encoder = PromptEncoder(core.tokenizer, core.vocabulary_size)

    def _load(self) -> Core:
        """On the worker thread. The core is kept at once: whoever waits for it may be cancelled."""
        continuous = _import_library()
        listener: Listener = continuous.Listener(
            on_outputs=lambda outputs: self._tell(self._on_outputs, outputs),
            on_failure=lambda key, error, fatal: self._tell(self._on_failure, key, error, fatal),
            on_end=lambda error: self._tell(self._on_end, error),
        )
        try:
            core: Core = continuous.load(self._options, listener)
        except BaseException as error:
            _let_go(error)
            raise
        self._loaded = core
        return core

    def _unload(self) -> None:
        """On the worker thread."""
        core, self._loaded = self._loaded, None
        if core is not None:
            core.close(CLOSE_TIMEOUT)
        del core
        if self._dead is not None:
            _let_go(self._dead)
        gc.collect()

    def _tell(self, method: Any, *args: Any) -> None:
        """On the generation thread: one hop to the loop. A loop that is closed has nobody waiting."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(method, *args)

    async def close(self) -> None:
        self._closed = True
        for task in self._encoding:
            task.cancel()
        self._requests.clear()
        self._keys.clear()
        self._core = None
        started, self._started = self._started, False
        try:
            if started:
                await self._thread.run(self._unload)
        finally:  # whoever waits for a hanging step may give up
            self._thread.close()

    # --------------------------------------------------------------------------------------------------------- requests

    def add_request(self, request: Request, sink: Sink) -> None:
        """Begin the request; a wrong prompt is told at once if it is short, and to the sink if it is long.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know.
            PromptTooLongError: there is no room for it and one more token.
            EngineDeadError: the engine takes no requests any more.
        """
        core = self._alive()
        prompt = request.prompt
        running = self._new_running(request, sink, core)
        if characters(prompt) <= INLINE_CHARACTERS:
            self._submit(running, self._encoder.encode(prompt, request.raw))
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
        return self._vocabulary.texts(token_ids)

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``steps`` and ``tokens`` so far, ``max_batch_size``, ``cache_free``: the share of the cache
        that nobody holds, and ``memory_bytes``: what CUDA has reserved on the device, or on a CPU the process has.
        """
        core = self._core
        return {
            "in_flight": float(len(self._requests)),
            "steps": float(core.sampler.steps) if core else 0.0,
            "tokens": float(self._tokens),
            "max_batch_size": float(self.max_batch_size),
            "cache_free": core.free_share() if core else 0.0,
            "memory_bytes": _memory(core.device) if core else 0.0,
        }

    def _alive(self) -> Core:
        if self._dead is not None or self._core is None:
            state = "has died" if self._dead is not None else "is not running"
            raise EngineDeadError(f"The transformers engine {state}; it takes no requests.") from self._dead
        return self._core

    def _new_running(self, request: Request, sink: Sink, core: Core) -> Running:
        from lmbridge.engines.transformers.sampling import Plan

        config = request.config
        stop_ids = frozenset(config.stop_token_ids or ()) | (frozenset() if config.ignore_eos else core.eos)
        stream = TextStream(self._vocabulary, config.stop_words, config.skip_special_tokens)
        return Running(f"{request.id}#{next(self._numbers)}", request, sink, stream, stop_ids, Plan(config))

    def _remember(self, running: Running) -> None:
        self._requests[running.key] = running
        self._keys[running.request.id] = running.key

    async def _encode_and_submit(self, running: Running) -> None:
        """A long prompt. The request may be aborted while the worker thread is at it."""
        try:
            ids = await self._thread.run(self._encoder.encode, running.request.prompt, running.request.raw)
            if running.key in self._requests:
                self._alive()
                self._submit(running, ids)
        except LMBridgeError as error:
            self._fail(running, error)
        except Exception as cause:
            self._fail(running, engine_error(f"The prompt could not be tokenised: {cause!r}.", cause))

    def _submit(self, running: Running, token_ids: list[int]) -> None:
        core = self._alive()
        left = core.room - len(token_ids)
        if left < 1:
            raise PromptTooLongError(
                f"The prompt has {len(token_ids)} tokens; there is room for {core.room}, one of them for the answer. "
                "Shorten it, or raise max_context or cache_share where the model allows it.",
                param="prompt",
            )
        running.prompt_tokens = len(token_ids)
        if running.plan.needed:
            core.sampler.add(running.key, running.plan)
        self._remember(running)
        budget = min(running.request.config.max_new_tokens, left)
        if not core.add(running.key, token_ids, budget, sorted(running.stop_ids)):
            self._loop.call_soon(self._on_end, core.fatal_error)

    # ---------------------------------------------------------------------------------- news from the generation thread

    def _on_outputs(self, outputs: list[Any]) -> None:
        self._tokens += len(outputs)  # streaming: one token each
        for output in outputs:
            running = self._requests.get(output.request_id)
            if running is not None:
                try:
                    self._advance(running, output)
                except Exception as cause:  # this answer's text or its sink; the others go on
                    self._abandon(running, cause)
            elif self._core is not None and output.request_id in self._unsure:
                self._unsure.remove(output.request_id)
                self._core.cancel(output.request_id)

    def _advance(self, running: Running, output: Any) -> None:
        """Take in what the step added; an output carries all tokens of its answer so far."""
        finished: bool = output.is_finished()
        piece, ended = running.take(output.generated_tokens, finished)
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
        """The last delta, with all that was held back."""
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
        with contextlib.suppress(Exception):  # of a sink that cannot be told
            self._fail(running, engine_error(f"The answer could not be handed on: {cause!r}.", cause))

    def _cancel(self, running: Running) -> None:
        """Stop it on the manager, unless it never got there.

        The manager empties one queue of requests and then one of cancellations. A cancellation put between may be read
        before its request, which then shows up once more.
        """
        if self._core is not None and running.prompt_tokens:
            self._core.cancel(running.key)
            if not running.tokens:
                self._unsure.append(running.key)

    def _forget(self, running: Running) -> None:
        self._requests.pop(running.key, None)
        if self._keys.get(running.request.id) == running.key:
            del self._keys[running.request.id]
        if self._core is not None:
            self._core.sampler.remove(running.key)

    def _on_failure(self, key: str, error: BaseException, fatal: bool) -> None:
        if fatal:
            self._on_end(error)
            return
        running = self._requests.get(key)
        if running is not None:
            self._fail(running, engine_error(f"The engine failed this request: {error!r}.", error))

    def _on_end(self, error: BaseException | None) -> None:
        """The generation thread ends, or has ended: whoever is inside is lost, and the server is told once."""
        if self._closed or self._dead is not None:
            return
        self._dead = error or RuntimeError("The generation thread of transformers ended without an error.")
        self._requests.clear()
        self._keys.clear()
        self.on_death(self._dead)


def _let_go(error: BaseException) -> None:
    """Empty the frames that an error's traceback leads to: they hold the model, and callers will hold the error."""
    for outer, _ in traceback.walk_tb(error.__traceback__):
        frame: FrameType | None = outer
        with contextlib.suppress(RuntimeError):  # this one is still running
            while frame is not None:
                frame.clear()
                frame = frame.f_back


def _memory(device: str) -> float:
    """Bytes held on the device: what CUDA has reserved for this process, or on a CPU all that the process has."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.memory_reserved(device))
    import psutil

    return float(psutil.Process().memory_info().rss)


def _import_library() -> Any:
    """The module that knows transformers."""
    try:
        import transformers

        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
            raise ImportError(f"transformers {transformers.__version__} is too old")
        from lmbridge.engines.transformers import continuous
    except ImportError as cause:
        raise MissingDependencyError(
            f"The transformers engine needs torch, transformers >= 5.17 and psutil ({cause}); "
            'install them with: pip install --upgrade torch "transformers>=5.17" psutil'
        ) from cause
    return continuous
