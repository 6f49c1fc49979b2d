"""Models and tokenizers made on the spot, and a harness that drives one engine on a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmbridge.engines.transformers import TransformersEngine
from lmbridge.messages import Delta, GenerationConfig, Logprobs, Prompt, Request, Usage, join_deltas

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = 256
BYTES = {byte: token for token, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level_tokenizer(chat_template: str | None = TEMPLATE) -> Any:
    """One token per byte, and a special token that ends the answer."""
    inner = Tokenizer(models.BPE(vocab={**BYTES, "<eos>": EOS}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_model(folder: Path, *, family: str = "llama", sharpness: float = 8.0, **settings: Any) -> str:
    """A small random model whose next token is clear: its logits are far apart, so that rounding decides nothing."""
    torch.manual_seed(settings.pop("seed", 0))
    shape: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    model = model_class(config_class(**{**shape, **settings}))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        model.lm_head.weight[EOS].zero_()  # ends no answer by chance
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


class Answer:
    """What one request's sink was told."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.deltas: list[Delta] = []
        self.ended = asyncio.Event()
        self.news = asyncio.Event()

    def sink(self, delta: Delta) -> None:
        assert not self.ended.is_set(), "a delta after the last one"
        self.deltas.append(delta)
        self.news.set()
        if delta.finish_reason is not None or delta.error is not None:
            self.ended.set()

    @property
    def whole(self) -> Delta:
        return join_deltas(self.deltas)

    @property
    def text(self) -> str:
        return self.whole.text

    @property
    def token_ids(self) -> list[int]:
        return self.whole.token_ids

    @property
    def reason(self) -> str | None:
        return self.whole.finish_reason

    @property
    def usage(self) -> Usage:
        usage = self.whole.usage
        assert usage is not None
        return usage

    @property
    def logprobs(self) -> list[Logprobs]:
        logprobs = self.whole.logprobs
        assert logprobs is not None
        return logprobs

    @property
    def error(self) -> BaseException | None:
        return self.deltas[-1].error

    async def wait(self) -> Answer:
        """Until the last delta."""
        await asyncio.wait_for(self.ended.wait(), 60)
        return self

    async def first(self) -> Answer:
        """Until there are tokens."""
        await asyncio.wait_for(self.news.wait(), 60)
        return self


class Driver:
    """Calls an engine as the server would."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.deaths: list[BaseException] = []
        self.died = asyncio.Event()
        self._numbers = itertools.count()
        engine.on_death = self._on_death

    def _on_death(self, cause: BaseException) -> None:
        self.deaths.append(cause)
        self.died.set()

    def request(self, prompt: Prompt, *, raw: bool = True, **config: Any) -> Request:
        return Request(
            id=f"r{next(self._numbers)}",
            prompt=prompt,
            config=GenerationConfig().merged(config),  # type: ignore[arg-type]
            raw=raw,
            client="test",
            priority=0,
            deadline=None,
            created=time.monotonic(),
            context=contextvars.copy_context(),
        )

    def add(self, prompt: Prompt, *, raw: bool = True, **config: Any) -> Answer:
        answer = Answer(self.request(prompt, raw=raw, **config))
        self.engine.check(answer.request)
        self.engine.add_request(answer.request, answer.sink)
        return answer

    async def ask(self, prompt: Prompt, *, raw: bool = True, **config: Any) -> Answer:
        return await self.add(prompt, raw=raw, **config).wait()

    @property
    def holders(self) -> set[str]:
        """Who holds blocks of the cache, as its manager knows them."""
        cache = self.runner._manager.batch_processor.cache
        return {key for part in cache.cache_allocators.values() for key in part.block_table}

    @property
    def runner(self) -> Any:
        """What generates, whose insides tests look into and tamper with."""
        assert self.engine._core is not None
        return self.engine._core.runner

    async def all(self, answers: Sequence[Answer]) -> list[Answer]:
        return [await answer.wait() for answer in answers]

    def abort(self, answer: Answer) -> None:
        self.engine.abort_request(answer.request.id)

    def stat(self, name: str) -> float:
        return self.engine.stats()[name]


class Brake:
    """Holds the generation thread in front of each step until it is let go; below the engine, so that nothing knows."""

    def __init__(self, driver: Driver) -> None:
        self._model = driver.runner._model
        self._permits = threading.Semaphore(0)
        self._arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        forward = self._model.forward

        @functools.wraps(forward)
        def held(*args: Any, **kwargs: Any) -> Any:
            loop.call_soon_threadsafe(self._arrived.set)
            assert self._permits.acquire(timeout=60)
            return forward(*args, **kwargs)

        self._model.forward = held

    async def arrival(self) -> None:
        """Until the thread stands in front of a step."""
        await asyncio.wait_for(self._arrived.wait(), 60)
        self._arrived.clear()

    def step(self) -> None:
        """Let it take one step."""
        self._permits.release()

    def lift(self) -> None:
        """Let it go on freely."""
        del self._model.forward
        self._permits.release(10_000)


@contextlib.asynccontextmanager
async def driven(model: str, **options: Any) -> AsyncIterator[Driver]:
    """A started engine, closed in the end."""
    engine = TransformersEngine(model, **{"device": "cpu", "max_context": 512, **options})
    driver = Driver(engine)
    try:
        await engine.start()
        yield driver
    finally:
        await engine.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def reference(llama: str) -> Any:
    """The same model, for ``generate`` and plain forwards."""
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


def generate(model: Any, prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
    """What ``model.generate`` answers greedily."""
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False, pad_token_id=EOS, **settings
        )
    return [int(token) for token in whole[0][len(prompt) :]]


@pytest.fixture(scope="session")
def ending(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[int]]:
    """A model that ends its greedy answer after some tokens, and that answer."""
    folder = tmp_path_factory.mktemp("models") / "ending"
    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(folder))
    free = generate(model, [1, 2, 3], 12)
    model.generation_config.eos_token_id = [EOS, free[8]]
    model.save_pretrained(folder)
    return str(folder), free[: free.index(free[8])]
