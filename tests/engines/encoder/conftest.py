"""Small encoders made on the spot, and a harness that drives the engine on a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lmbridge.engines.encoder import EncoderEngine
from lmbridge.messages import Delta, Embed, GenerationConfig, Job, Request

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other

_TEXT = (
    "the old sailor walked down to a harbour every morning and looked at that sea which was never quite same where did "
    "go cat dog sat on mat stock prices fell sharply today query document passage poison"
)
WORDS = _TEXT.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:!?<>[]"
ROOM = 300
"""Tokens that the small models read."""
MIXED = [
    " ".join(WORDS[(7 * n + m) % 30] for m in range(count)) for n, count in enumerate((1, 60, 5, 5, 120, 17, 2, 33))
]


def tokenizer(*, pad: int = 0, closing: bool = False, specials: bool = True) -> Any:
    """Words, and letters of the others.

    Args:
        pad: the id of the padding token; RoBERTa's is 1.
        closing: texts get a token behind them and none before, as those of decoders do.
        specials: False adds none at all.
    """
    names = ["[PAD]", "[CLS]"] if pad == 0 else ["[CLS]", "[PAD]"]
    listed = [*names, "[SEP]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(listed))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1_000_000))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if specials:
        single, pair = ("$A [SEP]", "$A $B:1 [SEP]:1") if closing else ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


_BERT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": ROOM,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "pad_token_id": 1, "max_position_embeddings": ROOM + 2}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_BERT, "type_vocab_size": 2}),
    "roberta": ("Roberta", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", _ROBERTA),
    "modernbert": (
        "ModernBert",
        {**_BERT, "global_attn_every_n_layers": 2, "local_attention": 32, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 160,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": ROOM,
            "initializer_range": 0.3,
        },
    ),
    "mpnet": ("MPNet", _ROBERTA),
    "qwen3": ("Qwen3", {**_BERT, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("Mistral", {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24}),
}
FAMILIES = tuple(_FAMILIES)


def save_model(folder: Path, family: str = "bert", *, head: str = "Model", seed: int = 0, **settings: Any) -> str:
    """A small random model with its tokenizer.

    Args:
        head: ``"Model"``, or ``"ForSequenceClassification"``.
    """
    torch.manual_seed(seed)
    name, shape = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**shape, **settings})
    getattr(transformers, f"{name}{head}")(config).save_pretrained(folder)
    pad = shape.get("pad_token_id", 0)
    made = tokenizer(pad=pad, closing=family in ("qwen3", "mistral"))
    if family in ("roberta", "xlm-roberta", "distilbert", "modernbert", "mpnet", "qwen3", "mistral"):
        made.model_input_names = ["input_ids", "attention_mask"]
    made.save_pretrained(folder)
    return str(folder)


def add_modules(
    folder: str | Path,
    *modules: tuple[str, dict[str, Any]],
    own: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
    package: str = "sentence_transformers.models",
) -> None:
    """The files that sentence-transformers keeps beside a model: modules by kind and configuration."""
    base = Path(folder)
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"}]
    for number, (kind, config) in enumerate(modules, 1):
        path = base / f"{number}_{kind}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        listed.append({"idx": number, "name": str(number), "path": path.name, "type": f"{package}.{kind}"})
    (base / "modules.json").write_text(json.dumps(listed))
    (base / "sentence_bert_config.json").write_text(json.dumps(own or {}))
    (base / "config_sentence_transformers.json").write_text(json.dumps(general or {}))


def alone(folder: str, text: str, pooling: str = "mean", length: int = ROOM) -> Any:
    """The text's vector of length 1 by transformers' own calls."""
    model, made = _loaded(folder)
    given = made(text, return_tensors="pt", truncation=True, max_length=length)
    with torch.no_grad():
        hidden = model(**given).last_hidden_state[0]
    places = torch.arange(1, len(hidden) + 1)[:, None]
    vector = {
        "mean": lambda: hidden.mean(0),
        "cls": lambda: hidden[0],
        "lasttoken": lambda: hidden[-1],
        "max": lambda: hidden.max(0).values,
        "mean_sqrt_len_tokens": lambda: hidden.sum(0) / len(hidden) ** 0.5,
        "weightedmean": lambda: (hidden * places).sum(0) / places.sum(),
    }[pooling]()
    return torch.nn.functional.normalize(vector, dim=0).numpy()


def score_alone(folder: str, query: str, document: str) -> float:
    """The pair's score by transformers' own calls."""
    made: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(
            **made(query, document, return_tensors="pt", truncation="longest_first", max_length=ROOM)
        ).logits[0]
    return float(logits[0].sigmoid() if len(logits) == 1 else logits.softmax(0)[-1])


@functools.lru_cache(maxsize=4)
def _loaded(folder: str) -> tuple[Any, Any]:
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def apart(found: Any, expected: Any) -> float:
    """The largest difference."""
    return float(numpy.abs(numpy.asarray(found) - numpy.asarray(expected)).max())


class Answer:
    """What one request's sink was told."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.last: Delta | None = None
        self.ended = asyncio.Event()

    def sink(self, delta: Delta) -> None:
        assert self.last is None, "a delta after the last one"
        self.last = delta
        self.ended.set()

    @property
    def value(self) -> Any:
        assert self.last is not None
        assert self.last.error is None, self.last.error
        return self.last.value

    @property
    def error(self) -> BaseException | None:
        return self.last.error if self.last is not None else None

    async def wait(self) -> Answer:
        """Until the last delta."""
        await asyncio.wait_for(self.ended.wait(), 60)
        return self


class Driver:
    """Calls an engine as the server would."""

    def __init__(self, engine: EncoderEngine) -> None:
        self.engine = engine
        self.deaths: list[BaseException] = []
        self._numbers = itertools.count()
        engine.on_death = self.deaths.append

    def add(self, job: Job | str, client: str = "test") -> Answer:
        """``job``: a string is a text to embed."""
        answer = Answer(_request(f"r{next(self._numbers)}", Embed(job) if isinstance(job, str) else job, client))
        self.engine.check(answer.request)
        self.engine.add_request(answer.request, answer.sink)
        return answer

    async def ask(self, job: Job | str) -> Any:
        """The value; raises what the answer is instead."""
        answer = await self.add(job).wait()
        if answer.error is not None:
            raise answer.error
        return answer.value

    async def ask_all(self, jobs: Sequence[Job | str]) -> list[Any]:
        answers = [self.add(job) for job in jobs]
        return [(await answer.wait()).value for answer in answers]

    def abort(self, answer: Answer) -> None:
        self.engine.abort_request(answer.request.id)

    def stat(self, name: str) -> float:
        return self.engine.stats()[name]

    @property
    def layout(self) -> str:
        assert self.engine._core is not None
        return self.engine._core.layout.name

    @property
    def model(self) -> Any:
        """What computes, which tests tamper with."""
        assert self.engine._core is not None
        return self.engine._core.module


class Brake:
    """Holds the model in front of each run until it is let go; below the engine, so that nothing knows."""

    def __init__(self, driver: Driver) -> None:
        self._permits = threading.Semaphore(0)
        self._arrived = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold(*args: Any) -> None:
            loop.call_soon_threadsafe(self._arrived.set)
            assert self._permits.acquire(timeout=60)

        self._hook = driver.model.register_forward_pre_hook(hold)

    async def arrival(self) -> None:
        """Until the thread stands in front of a run."""
        await asyncio.wait_for(self._arrived.wait(), 60)
        self._arrived.clear()

    def lift(self) -> None:
        """Let it go on freely."""
        self._hook.remove()
        self._permits.release(10_000)


@contextlib.asynccontextmanager
async def driven(model: Any, **options: Any) -> AsyncIterator[Driver]:
    """A started engine, closed in the end."""
    engine = EncoderEngine(model, **options)
    driver = Driver(engine)
    try:
        await engine.start()
        yield driver
    finally:
        await engine.close()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT without files of sentence-transformers."""
    return save_model(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT that scores pairs, with one label."""
    return save_model(tmp_path_factory.mktemp("encoders") / "ranker", head="ForSequenceClassification", num_labels=1)


def _request(key: str, job: Job, client: str) -> Request:
    return Request(
        id=key,
        prompt="",
        config=GenerationConfig(),
        raw=False,
        client=client,
        priority=0,
        deadline=None,
        created=time.monotonic(),
        context=contextvars.copy_context(),
        job=job,
    )
