"""What the two ExLlama engines have in common: requests, their answers, and the life of the model.

Rule: server thread, except where a docstring says otherwise. ExLlama is imported when an engine starts and no earlier.

Two threads work for an engine. One owns the model: it loads it, steps the generator and frees it. The other tokenises
long prompts and compiles grammars, so that neither delays a step.
"""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmbridge.engines.answer import Answer
from lmbridge.engines.base import Engine
from lmbridge.engines.dialect import Dialect
from lmbridge.engines.encoding import PromptEncoder
from lmbridge.engines.exllama.generation import Generation, Job, News
from lmbridge.engines.exllama.library import Parts
from lmbridge.engines.exllama.model import ExLlamaModel, ending_ids, fetched
from lmbridge.engines.exllama.options import ExLlamaOptions
from lmbridge.engines.models import find_model
from lmbridge.engines.text import Vocabulary
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineDeadError, EngineStartError, InvalidRequestError
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Request

CLOSE_TIMEOUT = 5.0
"""Seconds to wait on closing for the current step; a model that hangs in it is left behind."""
PROOF = GenerationConfig(max_new_tokens=2)


@dataclass(frozen=True)
class _Prepared:
    """A request on its way to the generator."""

    prompt: list[int]
    guide: Any = None


class ExLlamaEngine(Engine):
    """A model under ExLlama; see the two that derive from it."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {
            "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p",
            "repetition_penalty", "random_seed", "logit_bias", "stop_words", "include_stop_str_in_output",
            "stop_token_ids", "ignore_eos", "skip_special_tokens", "truncate_prompt_tokens", "chat_template_kwargs",
            "add_generation_prompt", "continue_final_message", "response_format", "grammar", "tools", "tool_choice",
            "parallel_tool_calls", "separate_reasoning",
        }
    )  # fmt: skip
    cache_widths: ClassVar[Sequence[int]]
    library: ClassVar[Parts]

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | None = None,
        gpu_split: Sequence[float] | None = None,
        tp: int = 1,
        max_batch_size: int = 32,
        max_chunk_size: int = 2048,
        max_context: int | None = None,
        cache_tokens: int | None = None,
        cache_bits: int = 16,
        revision: str | None = None,
    ) -> None:
        self._label = os.fspath(model)
        self._options = ExLlamaOptions(
            model=find_model(model),
            cache_widths=self.cache_widths,
            device=device,
            gpu_split=gpu_split,
            tp=tp,
            max_batch_size=max_batch_size,
            max_chunk_size=max_chunk_size,
            max_context=max_context,
            cache_tokens=cache_tokens,
            cache_bits=cache_bits,
            revision=revision,
        )
        self.max_batch_size = max_batch_size
        self._owner = EngineThread(f"lmbridge {self.name}")
        self._helper = EngineThread(f"lmbridge {self.name} prompts")
        for thread in (self._owner, self._helper):
            # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
            weakref.finalize(self, thread.close).atexit = False
        self._model: ExLlamaModel | None = None  # set and used only by the owner thread
        self._generation: Generation | None = None
        self._ready = self._started = False
        self._proof: Job | None = None
        self._jobs: dict[str, Job] = {}  # by the request's id
        self._held = 0

    def describe(self) -> str:
        return f"{self._label} on {self.library.package}"

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on its owner thread and generate a first answer.

        Raises:
            MissingDependencyError: ExLlama is missing, cannot be built, or has changed; the message names what.
            EngineStartError: the model generates nothing.
            Exception: whatever else ExLlama raises while loading the model.
        """
        self._started = True
        await self._owner.run(self._load)
        assert self._model is not None
        self.max_batch_size = self._model.batch
        self._generation = Generation(self._owner, self._model.generator, self.party, self._on_end)
        await self._prove(self._generation)
        self._held = await self._owner.run(self._model.footprint)
        self._ready = True

    def _load(self) -> None:
        """On the owner thread. The model is stored at once: the awaiting task may be cancelled."""
        self.library.check()
        import transformers

        from lmbridge.engines.transformers.guides import Grammars

        folder = fetched(self._options.model, self._options.revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = model = self._open(folder)
        self._ends = ending_ids(folder, tokenizer)
        self._vocabulary = Vocabulary(tokenizer)
        self._dialect = Dialect(tokenizer)
        self._encoder = PromptEncoder(tokenizer, model.vocabulary, model.room, self._dialect)
        self._grammars = Grammars(tokenizer, model.vocabulary, self._ends)

    @abstractmethod
    def _open(self, folder: str) -> ExLlamaModel:
        """The model in a folder, loaded; on the owner thread."""

    async def _prove(self, generation: Generation) -> None:
        """Generate two tokens, starting from an end token or the first one."""
        prompt = [min(self._ends, default=0)]
        self._proof = job = generation.begin(self._maker(_Prepared(prompt), PROOF))
        news = await job.news()
        while news.reason is None and news.error is None:
            news = await job.news()
        self._proof = None
        if news.error is not None:
            raise EngineStartError(f"{self.describe()} failed its first request: {shown(news.error)}") from news.error

    def _on_end(self, cause: BaseException) -> None:
        if self._ready:
            self._ready = False
            self.on_death(cause)
        elif self._proof is not None:
            self._proof.tell(News(error=cause))

    async def close(self) -> None:
        self._ready = False
        started, self._started = self._started, False
        generation, self._generation = self._generation, None
        try:
            stopped = generation is None or await generation.close(CLOSE_TIMEOUT)
            await super().close()
            if started and stopped:
                await self._owner.run(self._unload)
            elif started:
                logger.warning("%s hangs in a step (%s) and is left behind.", self.describe(), self.where())
        finally:
            self._owner.close()
            self._helper.close()

    def _unload(self) -> None:
        """On the owner thread."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    # --------------------------------------------------------------------------------------------------------- requests

    def check(self, request: Request) -> None:
        super().check(request)
        known = self._model.vocabulary if self._model is not None else None
        for token in request.config.logit_bias or ():
            if known is not None and token >= known:
                raise InvalidRequestError(
                    f"logit_bias names the token {token}, but the model's ids end at {known - 1}.", param="logit_bias"
                )

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know; or its grammar
                cannot be followed.
            PromptTooLongError: there is no room for it and one more token.
            EngineError: ExLlama failed this request.
            EngineDeadError: the engine takes no more requests.
        """
        config = request.config
        prepared = await self._prepare(request)
        if self._generation is None:
            raise EngineDeadError(f"The engine {self.name} is not running; it takes no requests.")
        generation = self._generation
        answer = Answer(config, self._vocabulary, prepared.prompt, self._dialect)
        job = self._jobs[request.id] = generation.begin(self._maker(prepared, config))
        try:
            reason: FinishReason | None = None
            while reason is None and not answer.stopped:
                news = await job.news()
                if prepared.guide is not None and prepared.guide.failure is not None:
                    raise prepared.guide.failure
                delta = answer.take(news.tokens, news.logprobs)
                if delta is not None:
                    yield delta
                if news.error is not None:
                    raise news.error
                reason = news.reason
            generation.end(job)  # we find stop words ourselves
            yield answer.finish(reason or "stop")
        finally:
            generation.end(job)
            if self._jobs.get(request.id) is job:  # the id may be in use again
                del self._jobs[request.id]

    async def _prepare(self, request: Request) -> _Prepared:
        """The request's tokens, and the mask for its grammar."""
        held = self._dialect.holds(request.config)
        prompt = None if held else self._encoder.at_once(request.prompt, request.raw, request.config)
        if prompt is not None:
            return _Prepared(prompt)
        return await self._helper.run(self._prepare_slowly, request, while_awaited=True)

    def _prepare_slowly(self, request: Request) -> _Prepared:
        """On the helper thread."""
        config = request.config
        prompt = self._encoder.encode(request.prompt, request.raw, config)
        form = self._dialect.form(config)
        if form is None:
            return _Prepared(prompt)
        return _Prepared(prompt, self._grammars.guide(form, self._dialect.thought_end(config, prompt)))

    def _maker(self, prepared: _Prepared, config: GenerationConfig) -> Callable[[], Any]:
        """A function that makes ExLlama's job on the owner thread."""
        ends = {*(config.stop_token_ids or ()), *(() if config.ignore_eos else self._ends)}

        def make() -> Any:
            from lmbridge.engines.exllama.guide import Mask

            assert self._model is not None
            budget = min(config.max_new_tokens, self._model.room - len(prepared.prompt))
            mask = None if prepared.guide is None else Mask(prepared.guide)
            return self._model.job(prepared.prompt, budget, sorted(ends), config, mask)

        return make

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._vocabulary.texts(token_ids)

    def progress(self, request_id: str) -> int | None:
        job = self._jobs.get(request_id)
        return None if job is None or self._generation is None else self._generation.progress(job)

    def where(self) -> str:
        generation = self._generation
        return "" if generation is None else generation.where()

    def footprint(self) -> int | None:
        return self._held or None

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``steps`` and ``tokens``."""
        generation = self._generation
        steps, tokens = (0, 0) if generation is None else (generation.steps, generation.tokens)
        return {**super().stats(), "steps": float(steps), "tokens": float(tokens)}
