"""The scripted encoder: what it promises to tests that use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from lmbridge import Bridge, EngineDeadError, EngineError, InvalidRequestError, PromptTooLongError, RequestTimeoutError
from lmbridge.testing import ScriptedEncoder, score_of, vector_of

PATIENCE = 30.0


@pytest.fixture
def build() -> Iterator[Any]:
    """Builds a bridge over a scripted encoder; the bridge's options go to it, the others to the encoder."""
    with ExitStack() as stack:

        def make(stall_timeout: float | None = 300.0, **options: Any) -> tuple[Bridge, ScriptedEncoder]:
            encoder = ScriptedEncoder(**options)
            bridge = Bridge(encoder, stall_timeout=stall_timeout)
            stack.callback(bridge.close)
            return bridge, encoder

        yield make


def test_vectors_can_be_known(build: Any) -> None:
    """A test can say which vectors its app must have got: of a text, whatever else is in the batch."""
    bridge, _ = build()
    vectors = bridge.embed(["one", "two", "one", ""])
    assert vectors.shape == (4, 8)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[0], vector_of("one"))
    assert np.array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert np.array_equal(bridge.embed([1, 2]), vector_of("1 2"))
    assert np.array_equal(bridge.embed("one", prompt="query: "), vector_of("query: one"))


def test_dimensions_are_cut_before_the_length(build: Any) -> None:
    """Fewer dimensions are the first of all, of length 1 again unless asked otherwise; too many are refused."""
    bridge, _ = build()
    raw = bridge.embed("one", normalize=False)
    assert np.array_equal(bridge.embed("one", normalize=False, dimensions=3), raw[:3])
    assert np.allclose(bridge.embed("one", dimensions=3), raw[:3] / np.linalg.norm(raw[:3]))
    with pytest.raises(InvalidRequestError, match="8 dimensions"):
        bridge.embed("one", dimensions=9)


def test_scores_can_be_known(build: Any) -> None:
    """A document's score is the share of the query's words that it has."""
    bridge, _ = build()
    ranked = bridge.rerank("red fox", ["a hen", "The RED fox", "a fox"])
    assert [(one.index, one.score) for one in ranked] == [(1, 1.0), (2, 0.5), (0, 0.0)]
    assert score_of("", "anything") == 0


def test_words_are_counted(build: Any) -> None:
    """Usage says how many words were read, the query's for each document."""
    bridge, encoder = build()
    assert [one.usage.prompt_tokens for one in bridge.embed(["a b c", "d"], details=True)] == [3, 1]
    assert [one.usage.prompt_tokens for one in bridge.rerank("a b", ["c d e"], details=True)] == [5]
    assert encoder.stats()["items"] == 3
    assert encoder.stats()["tokens"] == 9


def test_batches_by_hand(build: Any) -> None:
    """With ``manual`` a batch runs when the test says so, and has what was there when it began."""
    bridge, encoder = build(manual=True, max_batch_size=2)
    first = bridge.submit_embed("first")
    encoder.wait_for(lambda encoder: encoder.active == 1)
    encoder.step()
    assert first.result(PATIENCE).shape == (8,)
    future = bridge.submit_embed(["a", "b", "c"])
    encoder.wait_for(lambda encoder: len(encoder.started) >= 3)
    assert not future.done()
    encoder.step(3)
    assert future.result(PATIENCE).shape == (3, 8)
    assert sorted(text for batch in encoder.batches for text in batch) == ["a", "b", "c", "first"]
    assert max(map(len, encoder.batches)) <= 2


def test_tokens_in_a_batch(build: Any) -> None:
    """A batch has at most so many words, and a longer text goes alone."""
    bridge, encoder = build(manual=True, max_batch_tokens=4)
    gate = bridge.submit_embed("first")
    encoder.wait_for(lambda encoder: encoder.active == 1)
    future = bridge.submit_embed(["a b", "c d", "e f g h i j", "k"])
    encoder.wait_for(lambda encoder: encoder.active == 5)
    encoder.step(4)
    assert len(future.result(PATIENCE)) == 4
    assert gate.result(PATIENCE) is not None
    assert encoder.batches[1:] == [["a b", "c d"], ["e f g h i j"], ["k"]]


def test_one_text_fails_alone(build: Any) -> None:
    """``fail`` and ``refuse`` end the one text they name; the others of its batch are answered."""
    bridge, encoder = build()
    encoder.fail("bad", ValueError("no"))
    encoder.refuse("worse", InvalidRequestError("never"))
    found = bridge.embed(["good", "bad", "worse", "fine"], return_exceptions=True)
    assert np.array_equal(found[0], vector_of("good"))
    assert isinstance(found[1], EngineError)
    assert isinstance(found[1].__cause__, ValueError)
    assert isinstance(found[2], InvalidRequestError)
    assert np.array_equal(found[3], vector_of("fine"))


def test_long_texts(build: Any) -> None:
    """``max_length`` stands for what a model reads: longer is refused, or cut where that is allowed."""
    bridge, _ = build(max_length=2)
    with pytest.raises(PromptTooLongError, match="3 tokens"):
        bridge.embed("a b c")
    assert bridge.embed("a b c", truncate="end").shape == (8,)
    assert len(bridge.rerank("a b", ["c d"])) == 1


def test_cancelled_texts_shift_nobody(build: Any) -> None:
    """A text that is cancelled in its batch leaves the others their own vectors."""
    bridge, encoder = build(manual=True)
    blocker = bridge.submit_embed("blocker")
    encoder.wait_for(lambda encoder: encoder.active == 1)
    futures = {text: bridge.submit_embed(text) for text in ("a", "b", "c")}
    encoder.wait_for(lambda encoder: encoder.active == 4)
    assert futures["b"].cancel()
    encoder.wait_for(lambda encoder: len(encoder.aborted) == 1)
    encoder.step(2)
    assert blocker.result(PATIENCE) is not None
    for text in ("a", "c"):
        assert np.array_equal(futures[text].result(PATIENCE), vector_of(text))


def test_it_dies_stalls_and_forgets(build: Any) -> None:
    """The cues for what goes wrong with a real one: death, silence, and a text that is lost."""
    bridge, encoder = build(manual=True)
    future = bridge.submit_embed("a")
    encoder.wait_for(lambda encoder: encoder.active == 1)
    encoder.crash(RuntimeError("lost"))
    assert isinstance(future.exception(PATIENCE), EngineDeadError)
    bridge, encoder = build(stall_timeout=0.5)
    bridge.start()
    encoder.stall()
    with pytest.raises(EngineDeadError, match="no progress"):
        bridge.embed("a")
    bridge, encoder = build()
    encoder.forget("a")
    with pytest.raises(RequestTimeoutError):
        bridge.embed("a", timeout=0.2)


def test_it_does_what_it_is_told_alone(build: Any) -> None:
    """An encoder that only embeds refuses to rank, in the words of any engine."""
    bridge, _ = build(tasks=["embed"])
    assert bridge.embed("a").shape == (8,)
    with pytest.raises(InvalidRequestError, match="cannot rerank"):
        bridge.rerank("a", ["b"])


def test_a_start_that_waits(build: Any) -> None:
    """Loading waits for its gate; what was asked meanwhile is answered afterwards."""
    gate = threading.Event()
    bridge, _ = build(start_gate=gate)
    future = bridge.submit_embed("a")
    assert not future.done()
    gate.set()
    assert future.result(PATIENCE).shape == (8,)


def test_many_threads(build: Any) -> None:
    """Each of many threads gets the vectors of its own texts."""
    bridge, encoder = build(max_batch_size=8)

    def ask(place: int) -> bool:
        texts = [f"{place} {n}" for n in range(20)]
        return np.array_equal(bridge.embed(texts), np.stack([vector_of(text) for text in texts]))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(32)))
    assert encoder.stats()["in_flight"] == 0
