"""embed and rerank as callers meet them; what an encoder makes of texts is tested with the encoder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lmbridge import (
    Bridge,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    Ranked,
    RequestAbortedError,
    RequestTimeoutError,
    Response,
    UnsupportedTaskError,
)
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from lmbridge.testing.scripted_encoder import score_of, vector_of
from tests.conftest import until_living

TEXTS = [f"text number {number}" for number in range(40)]
DOCUMENTS = ["a red fox", "the quick red fox jumps", "nothing of it", "quick"]


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    with Bridge(lambda: ScriptedEncoder(max_length=100, max_batch_size=8)) as bridge:
        yield bridge


def test_one_text_and_a_list(bridge: Bridge) -> None:
    """One text gives a row, a list gives a matrix in its order, and an empty list an empty one."""
    one = bridge.embed("hello")
    assert (one.shape, one.dtype.name) == ((8,), "float32")
    assert (one == vector_of("hello")).all()
    many = bridge.embed(TEXTS, progress=True)
    assert (many.shape, many.dtype.name) == ((40, 8), "float32")
    assert (many == np.stack([vector_of(text) for text in TEXTS])).all()
    assert bridge.embed([]).shape == (0, 0)
    assert bridge.embed(["alone"]).shape == (1, 8)


def test_token_ids_are_a_text(bridge: Bridge) -> None:
    """A list of numbers is one text, and a list of such lists several; so are arrays."""
    assert bridge.embed([5, 6, 7]).shape == (8,)
    assert (bridge.embed(np.array([5, 6, 7])) == bridge.embed([5, 6, 7])).all()  # type: ignore[call-overload]
    assert bridge.embed([[5, 6], [7]]).shape == (2, 8)


def test_options_reach_the_engine(bridge: Bridge) -> None:
    """What is asked of a vector holds for each text of a list."""
    assert bridge.embed(TEXTS, dimensions=3).shape == (40, 3)
    assert np.linalg.norm(bridge.embed("x", normalize=False)) != pytest.approx(1.0)
    assert (bridge.embed("x", prompt="query: ") != bridge.embed("x")).any()
    with pytest.raises(InvalidRequestError, match="8 dimensions"):
        bridge.embed("x", dimensions=9)


def test_a_ranking(bridge: Bridge) -> None:
    """The most relevant comes first; of equal ones the first; top_n cuts, and the documents come along."""
    ranking = bridge.rerank("quick fox", DOCUMENTS)
    assert [ranked.index for ranked in ranking] == [1, 0, 3, 2]
    assert ranking[0] == Ranked(1, score_of("quick fox", DOCUMENTS[1]), DOCUMENTS[1])
    assert [ranked.index for ranked in bridge.rerank("quick fox", DOCUMENTS, top_n=2)] == [1, 0]
    assert bridge.rerank("quick fox", []) == []
    mapped = bridge.rerank("quick", [{"text": "quick"}])  # type: ignore[list-item]
    assert mapped[0].document == "quick"


def test_details_have_usage_and_timings(bridge: Bridge) -> None:
    """Whoever bills or measures gets what was counted, in the order of the list."""
    responses = bridge.embed(TEXTS, details=True)
    assert [response.usage.prompt_tokens for response in responses] == [3] * 40
    one: Response = bridge.embed("a b", details=True)
    assert (one.usage.total_tokens, one.finish_reason, one.timings.total > 0) == (2, "stop", True)
    scores = bridge.rerank("quick", DOCUMENTS, details=True)
    assert [response.value for response in scores] == [score_of("quick", document) for document in DOCUMENTS]


def test_futures_and_other_loops(bridge: Bridge) -> None:
    """The same results by submit_… and a…."""
    assert (bridge.submit_embed("x").result(30) == vector_of("x")).all()
    assert (bridge.submit_embed(TEXTS).result(30) == bridge.embed(TEXTS)).all()
    assert bridge.submit_rerank("quick fox", DOCUMENTS, top_n=1).result(30)[0].index == 1

    async def others() -> None:
        one, many, ranking = await asyncio.gather(
            bridge.aembed("x"), bridge.aembed(TEXTS), bridge.arerank("quick fox", DOCUMENTS)
        )
        assert (one == vector_of("x")).all()
        assert many.shape == (40, 8)
        assert [ranked.index for ranked in ranking] == [1, 0, 3, 2]
        kept = await bridge.aembed(["x", "word " * 101], return_exceptions=True)
        assert isinstance(kept[1], InvalidRequestError)

    asyncio.run(others())


def test_a_text_that_fails_is_named_by_its_place(bridge: Bridge) -> None:
    """The first error is raised with its index; with return_exceptions the others' vectors are there."""
    texts = ["fine", "word " * 101, "also fine"]
    with pytest.raises(InvalidRequestError, match=r"Text 1 of the list: .*101 tokens; the model reads at most 100"):
        bridge.embed(texts)
    kept = bridge.embed(texts, return_exceptions=True)
    assert (kept[0] == vector_of("fine")).all()
    assert (kept[1].index, kept[2].shape) == (1, (8,))
    assert bridge.embed(texts, truncate="end").shape == (3, 8)
    with pytest.raises(InvalidRequestError, match="Document 0 of the list"):
        bridge.rerank("query", ["word " * 101], truncate="error")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda bridge: bridge.embed(None), "A text is a string"),
        (lambda bridge: bridge.embed({"a": 1}), "A text is a string"),
        (lambda bridge: bridge.embed(["fine", None]), "Text 1 of the list: A text is a string"),
        (lambda bridge: bridge.embed([1, -1]), "token ids >= 0"),
        (lambda bridge: bridge.embed("x", dimensions=0), "dimensions must be an int >= 1"),
        (lambda bridge: bridge.embed("x", normalize="yes"), "normalize must be True or False"),
        (lambda bridge: bridge.embed("x", truncate="start"), "truncate must be 'error' or 'end'"),
        (lambda bridge: bridge.embed("x", prompt=3), "prompt must be a string"),
        (lambda bridge: bridge.embed("x", temperature=1), "embed has no option 'temperature'"),
        (lambda bridge: bridge.embed("x", timeout=-1), "timeout must be seconds"),
        (lambda bridge: bridge.rerank(None, ["d"]), "query must be a string"),
        (lambda bridge: bridge.rerank("q", "d"), "documents must be a list"),
        (lambda bridge: bridge.rerank("q", ["d", 7]), "Document 1 of the list: A document is a string"),
        (lambda bridge: bridge.rerank("q", ["d"], top_n=0), "top_n must be an int >= 1"),
        (lambda bridge: bridge.submit_embed(["fine", 7.5]), "Text 1 of the list"),
    ],
)
def test_mistakes_are_named_before_anything_runs(bridge: Bridge, ask: Callable[[Any], object], words: str) -> None:
    """What is wrong is told where it was written, and nothing of the list is sent."""
    with pytest.raises(InvalidRequestError, match=words):
        ask(bridge)
    assert bridge.metrics.started == 0


def test_a_language_model_does_not_embed(scripted: Any) -> None:
    """It says so by name, and what to use; so does a bridge that only embeds."""
    bridge, _ = scripted()
    with pytest.raises(UnsupportedTaskError, match=r"'scripted' cannot embed; it can generate text .*engine='encoder'"):
        bridge.embed("x")
    embedding, _ = scripted(lambda: ScriptedEncoder(tasks=["embed"]))
    with pytest.raises(UnsupportedTaskError, match="cannot rerank; it can embed"):
        embedding.rerank("q", ["d"])
    with pytest.raises(UnsupportedTaskError, match="cannot generate text"):
        embedding.infer("x")
    assert embedding.embed("x").shape == (8,)
    assert (bridge.tasks(), embedding.tasks()) == ({"generate"}, {"embed"})


def test_a_long_list_passes_a_small_queue(scripted: Any) -> None:
    """A list may be longer than the queue, also where a full one refuses."""
    bridge, _ = scripted(lambda: ScriptedEncoder(max_batch_size=4), max_pending=8, when_full="reject")
    assert bridge.embed(TEXTS * 20).shape == (800, 8)
    assert bridge.metrics.started == bridge.metrics.outcomes["stop"] == 800


def test_deadline_abort_and_close_at_every_station(scripted: Any) -> None:
    """Whether a text waits or is being worked on, its caller hears of the end, and the others get what is theirs."""
    bridge, engine = scripted(ScriptedEncoder(manual=True, max_batch_size=2))
    with ThreadPoolExecutor(8) as pool:
        with pytest.raises(RequestTimeoutError):
            bridge.embed("late", timeout=0.05)
        futures = [pool.submit(bridge.embed, f"t{number}", request_id=f"own-{number}") for number in range(4)]
        until_living(bridge, 4)
        for request in bridge.requests()[::3]:  # one that is worked on, one that waits
            bridge.abort(request.id)
        while any(not future.done() for future in futures):
            engine.step()
        ended = [future.exception(0) for future in futures]
        assert sorted(type(error).__name__ for error in ended) == ["NoneType"] * 2 + ["RequestAbortedError"] * 2
        assert all(isinstance(error, RequestAbortedError) for error in ended if error)
        for number, future in enumerate(futures):
            if future.exception(0) is None:
                assert (future.result(0) == vector_of(f"t{number}")).all()
        waiting = pool.submit(bridge.embed, TEXTS)
        until_living(bridge, 40)
        bridge.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(30)


def test_death_and_swap(scripted: Any) -> None:
    """Texts that were not begun survive the engine's death and are answered by the next; a swap loses none."""
    engines: list[ScriptedEncoder] = []

    def build() -> ScriptedEncoder:
        engines.append(ScriptedEncoder(manual=not engines, max_batch_size=2))
        return engines[-1]

    bridge, _ = scripted(build)
    bridge.start()
    futures = [bridge.submit_embed(f"t{number}") for number in range(6)]
    engines[0].wait_for(lambda engine: engine.active == 2)
    engines[0].crash(ValueError("device lost"))
    lost = [future for future in futures if isinstance(future.exception(30), EngineError)]
    assert len(lost) == 2
    assert all(
        (future.result(30) == vector_of(f"t{n}")).all() for n, future in enumerate(futures) if future not in lost
    )
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(bridge.embed, TEXTS * 10)
        bridge.swap(lambda: ScriptedEncoder(max_batch_size=3))
        assert many.result(30).shape == (400, 8)


def test_metrics_and_requests_know_jobs(scripted: Any) -> None:
    """They are counted, listed and timed as prompts are."""
    bridge, engine = scripted(ScriptedEncoder(manual=True))
    future = bridge.submit_embed("a b c", client="indexer")
    engine.wait_for(lambda engine: engine.active == 1)
    (request,) = bridge.requests()
    assert (request.client, request.state) == ("indexer", "running")
    engine.step()
    future.result(30)
    assert (bridge.metrics.prompt_tokens, bridge.metrics.completion_tokens, bridge.metrics.total.count) == (3, 0, 1)


def test_an_engine_for_text_is_none_the_wiser(scripted: Any) -> None:
    """A ScriptedEngine that answers a prompt gives no value, and a Response of text has none."""
    bridge, _ = scripted(ScriptedEngine())
    assert bridge.infer("x").value is None


class Careless(ScriptedEncoder):
    """An engine that gives whatever it was made with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def _result(self, job: Any, text: str) -> Any:
        return self._value[text] if isinstance(self._value, dict) else self._value


@pytest.mark.parametrize("value", [None, "text", [], [[1.0]], [1.0, "x"], {1.0}])
def test_what_is_no_vector_is_named(scripted: Any, value: Any) -> None:
    """An engine of somebody's own may give anything; its callers must hear what is wrong with it."""
    bridge, _ = scripted(Careless(value))
    with pytest.raises(EngineError, match="instead of a vector; fix the engine"):
        bridge.embed("x")
    with pytest.raises(EngineError, match="Text 0 of the list"):
        bridge.embed(["x"])
    assert isinstance(bridge.embed(["x"], return_exceptions=True)[0], EngineError)
    with pytest.raises(EngineError, match="instead of a vector"):
        bridge.submit_embed(["x"]).result(30)


@pytest.mark.parametrize("value", [None, "high", float("nan"), [1.0]])
def test_what_is_no_score_is_named(scripted: Any, value: Any) -> None:
    """A score that compares to nothing would break the order of the others."""
    bridge, _ = scripted(Careless(value))
    with pytest.raises(EngineError, match=r"Document 0 of the list: .* instead of a score"):
        bridge.rerank("q", ["d"])


def test_vectors_are_float32_of_one_length(scripted: Any) -> None:
    """Lists and other precisions are made what is promised; lengths that differ cannot be."""
    bridge, _ = scripted(Careless({"short": [1.0, 2.0], "long": np.ones(3)}))
    assert bridge.embed(["short", "short"]).dtype == np.float32
    with pytest.raises(EngineError, match="vectors of 2 and of 3 numbers"):
        bridge.embed(["short", "long"])


@pytest.mark.parametrize("tasks", ["embed", [], ["embd"], 7])
def test_tasks_that_are_none_are_refused_at_the_start(scripted: Any, tasks: Any) -> None:
    """A slip of the pen in an engine must not show as a refusal of everything."""
    engine = ScriptedEncoder()
    engine.tasks = tasks
    bridge, _ = scripted(engine)
    with pytest.raises(EngineStartError, match="tasks"):
        bridge.start()


def test_a_future_names_the_text(bridge: Bridge) -> None:
    """As the blocking form does."""
    with pytest.raises(InvalidRequestError, match="Text 1 of the list"):
        bridge.submit_embed(["fine", "word " * 101]).result(30)


def test_a_list_that_its_owner_uses_again_changes_nothing(scripted: Any) -> None:
    """The ranking has the documents as they were sent."""
    bridge, engine = scripted(ScriptedEncoder(manual=True))
    documents = ["quick fox", "nothing"]
    future = bridge.submit_rerank("quick", documents)
    documents[:] = ["another's", "another's"]
    engine.wait_for(lambda engine: engine.active == 2)
    engine.step(2)  # the first may have gone alone
    assert [ranked.document for ranked in future.result(30)] == ["quick fox", "nothing"]
