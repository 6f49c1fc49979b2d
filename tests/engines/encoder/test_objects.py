"""Models given as objects of sentence-transformers: they are recognised, and used by their parts or as they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

from lmbridge import Bridge
from lmbridge.engines.encoder import EncoderEngine
from lmbridge.errors import EngineStartError, InvalidRequestError, PromptTooLongError
from tests.engines.encoder.conftest import MIXED, add_modules, alone, apart, save_model

_WHY = "pip install sentence-transformers; no extra brings it, since lmbridge reads its files without it"


class _FakeOfThatPackage(torch.nn.Module):
    """Cannot be taken apart: it has none of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.prompts = {"query": "q: "}
        self.calls: list[int] = []
        self.threads: set[str] = set()

    def encode(self, texts: list[str], prompt_name: Any, prompt: Any, **options: Any) -> Any:
        """(length, number of blanks, length of the prompt) of each."""
        assert options["batch_size"] == len(texts)
        assert not options["show_progress_bar"]
        self.calls.append(len(texts))
        self.threads.add(threading.current_thread().name)
        lead = self.prompts[prompt_name] if prompt_name else prompt or ""
        return numpy.array([[len(text), text.count(" "), len(lead)] for text in texts], numpy.float32)


class _FakeRanker(torch.nn.Module):
    """As above, for pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def predict(self, pairs: list[tuple[str, str]], activation_fn: Any, **options: Any) -> Any:
        assert isinstance(activation_fn, torch.nn.Identity)
        return numpy.array([float(query in document) * 4 - 2 for query, document in pairs], numpy.float32)


for _fake, _name in ((_FakeOfThatPackage, "SentenceTransformer"), (_FakeRanker, "CrossEncoder")):
    _fake.__module__, _fake.__name__ = "sentence_transformers.fake", _name


def test_an_object_that_cannot_be_taken_apart_is_used_as_it_is() -> None:
    """``Bridge(model)`` would call it as a function that builds an engine, or share it among threads: it crashes."""
    model = _FakeOfThatPackage()
    with Bridge(model) as bridge, ThreadPoolExecutor(16) as pool:
        assert "a SentenceTransformer on encoder (embed, its own" in bridge.describe()
        found = list(pool.map(lambda text: bridge.embed(text, normalize=False), MIXED * 4))
        assert found[: len(MIXED)] == [pytest.approx([len(text), text.count(" "), 0]) for text in MIXED]
        assert bridge.embed(["a b"] * 50, normalize=False).shape == (50, 3)
        assert bridge.embed("a b", prompt="query", normalize=False)[2] == 3
        assert bridge.embed("a b", prompt="literal", normalize=False)[2] == 7
        assert bridge.embed("a b", prompt="document", normalize=False)[2] == 0
        with pytest.raises(InvalidRequestError, match="not token ids"):
            bridge.embed([1, 2, 3])
        with pytest.raises(InvalidRequestError, match="vectors have 3"):
            bridge.embed("a b", dimensions=4)
    assert max(model.calls) > 1
    assert model.threads == {"lmbridge encoder"}


def test_a_ranker_that_cannot_be_taken_apart() -> None:
    """As above."""
    with Bridge(_FakeRanker(), max_batch_size=2) as bridge:
        ranked = bridge.rerank("cat", ["a dog", "a cat", "a bird"])
        assert [one.index for one in ranked] == [1, 0, 2]
        assert ranked[0].score == pytest.approx(1 / (1 + numpy.exp(-2)))
        assert bridge.stats()["max_batch_size"] == 2
    with pytest.raises(InvalidRequestError, match="no option 'runner'"):
        Bridge(_FakeRanker(), runner="paged")
    with pytest.raises(EngineStartError, match="do not support layout"), Bridge(_FakeRanker(), layout="packed"):
        pass


def test_a_score_is_what_the_object_makes_it() -> None:
    """Scores that the program knows as logits would come out as probabilities, and all large ones as 1."""
    ranker: Any = _FakeRanker()
    ranker.activation_fn = torch.nn.Identity()
    with Bridge(ranker) as bridge:
        assert [one.score for one in bridge.rerank("cat", ["a dog", "a cat"])] == [2.0, -2.0]
        assert "identity score" in bridge.describe()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"max_length": 16}, EngineStartError, "max_length"),
        ({"pooling": "cls", "layout": "grouped"}, EngineStartError, "pooling or layout"),
        ({"dtype": "bfloat16"}, InvalidRequestError, "dtype"),
        ({"revision": "main"}, InvalidRequestError, "revision"),
        ({"task": "rerank"}, InvalidRequestError, "task"),
    ],
)
def test_options_that_an_object_cannot_have(options: Any, error: Any, named: str) -> None:
    """A limit or a type that was asked for would be left out without a word."""
    with pytest.raises(error, match=named), Bridge(_FakeOfThatPackage(), **options):
        pass


def test_an_object_stays_on_its_device() -> None:
    """As above; asking for where it is anyway is no mistake."""
    model: Any = _FakeOfThatPackage()
    model.device = torch.device("cuda:0")
    EncoderEngine(model, device="cuda", task="embed", dtype="auto")
    with pytest.raises(InvalidRequestError, match="device='cpu' cannot be combined with"):
        EncoderEngine(model, device="cpu")


class _FakeWithParts(_FakeOfThatPackage):
    """Is made of a real model and a tokenizer, and says what these say."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.auto_model = transformers.AutoModel.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.prompts = {}
        self.max_seq_length = 250

    def __iter__(self) -> Any:
        return iter([self])

    def encode(self, texts: list[str], *args: Any, **options: Any) -> Any:
        return numpy.stack([alone(self.folder, text, length=self.max_seq_length) for text in texts])


_FakeWithParts.__module__, _FakeWithParts.__name__ = "sentence_transformers.fake", "Transformer"


def test_an_object_takes_the_options_of_a_folder(bert: str) -> None:
    """A limit on the length would be left out, and the object be served by its slow methods for it."""
    model = _FakeWithParts(bert)
    with Bridge(model) as bridge:
        assert "packed, mean pooling (none stated), 250 tokens" in bridge.describe()
    with Bridge(model, max_length=16, pooling="cls", layout="grouped") as bridge:
        assert "grouped, cls pooling, 16 tokens" in bridge.describe()
        with pytest.raises(PromptTooLongError):
            bridge.embed("cat " * 20)
        found = bridge.embed(MIXED, truncate="end")
        assert apart(found, [alone(bert, text, "cls", length=16) for text in MIXED]) <= 1e-5


@pytest.mark.long
def test_objects_are_served_by_their_parts(tmp_path: Path) -> None:
    """A model that the program has loaded already would be served as slowly as by itself, or say something else."""
    library = pytest.importorskip("sentence_transformers", reason=_WHY)
    folder = save_model(tmp_path / "embed")
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    prompts = {"prompts": {"query": "query "}, "default_prompt_name": "query"}
    add_modules(folder, ("Pooling", pooling), own={"max_seq_length": 64}, general=prompts)
    ranker = save_model(tmp_path / "rank", head="ForSequenceClassification", num_labels=1)

    theirs = library.SentenceTransformer(folder, device="cpu")
    theirs.append(library.sentence_transformer.modules.Dense(32, 6))
    theirs.append(library.sentence_transformer.modules.Normalize())
    before, config = theirs.encode(MIXED), theirs[0].auto_model.config._attn_implementation
    with Bridge(theirs) as bridge, ThreadPoolExecutor(2) as pool:
        assert "packed, mean pooling, 64 tokens" in bridge.describe()
        busy = pool.submit(bridge.embed, MIXED * 20, truncate="end")
        assert apart(theirs.encode(MIXED), before) <= 1e-5  # it may be used beside the bridge
        assert apart(busy.result(60)[: len(MIXED)], before) <= 1e-5
    assert theirs[0].auto_model.config._attn_implementation == config

    judge = library.CrossEncoder(ranker, device="cpu")
    expected = judge.predict([("the cat", text) for text in MIXED])
    with Bridge(judge) as bridge:
        assert "rerank, packed" in bridge.describe()
        scores = {one.index: one.score for one in bridge.rerank("the cat", MIXED)}
        assert apart([scores[number] for number in range(len(MIXED))], expected) <= 1e-5
