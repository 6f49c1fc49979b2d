"""A list of prompts in, a list of answers out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import Bridge, EngineError, InvalidRequestError, QueueFullError, RequestTimeoutError, Response
from lmbridge.caller.prompts import is_batch
from lmbridge.testing import ScriptedEngine
from tests.conftest import until

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [
        ("text", False),
        ([{"role": "user", "content": "x"}], False),
        ([1, 2, 3], False),
        (["a", "b"], True),
        ([[{"role": "user", "content": "x"}]], True),
        ([[1, 2], [3]], True),
        ([], True),
    ],
)
def test_what_is_a_batch(prompts: Any, batch: bool) -> None:
    """A conversation and a list of token ids are one prompt; a list of those, or of texts, is a batch."""
    assert is_batch(prompts) is batch


def test_answers_come_in_order(scripted: Scripted) -> None:
    """Answers stand where their prompts stood, whatever order the engine finished them in."""
    bridge, _ = scripted(ScriptedEngine(max_batch_size=4))
    prompts = [" ".join(f"w{number}" for _ in range(1 + number % 7)) for number in range(50)]
    assert [response.text for response in bridge.infer(prompts)] == prompts
    assert list[Response](bridge.infer(list[str]())) == []


def test_one_prompt_gives_one_response(scripted: Scripted) -> None:
    """A conversation or token ids as a flat list give one Response, not a list."""
    bridge, _ = scripted()
    assert bridge.infer([{"role": "user", "content": "hello"}]).text == "hello"
    assert bridge.infer([7, 8]).text == "7 8"
    assert [r.text for r in bridge.infer([[7, 8], [9]])] == ["7 8", "9"]


@pytest.mark.parametrize("when_full", ["block", "reject"])
def test_a_list_longer_than_the_limits_flows_through(scripted: Scripted, when_full: str) -> None:
    """A list of any length goes through a small queue; its own length never makes it fail."""
    bridge, _ = scripted(ScriptedEngine(max_batch_size=2), max_pending=4, max_pending_per_client=3, when_full=when_full)
    prompts = [f"prompt {number}" for number in range(200)]
    assert [response.text for response in bridge.infer(prompts)] == prompts
    until(lambda: bridge.requests() == [])


def test_first_error_aborts_the_rest(scripted: Scripted) -> None:
    """One failing prompt raises with its position, and the others do not go on generating behind the caller's back."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    engine.fail("two", ValueError("broken"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bridge.infer, ["zero and more", "one and more", "two", "three and more"])
        engine.wait_for(lambda e: e.active == 4)
        engine.step(1)
        error = waiting.exception(10)
    assert isinstance(error, EngineError)
    assert error.index == 2
    engine.wait_for(lambda e: e.active == 0)
    assert len(engine.aborted) == 3


def test_errors_in_their_slots(scripted: Scripted) -> None:
    """With return_exceptions=True each failed prompt's slot holds its own error and the others their answers."""
    bridge, engine = scripted()
    engine.fail("bad", ValueError("broken"))
    results = bridge.infer(["good", "bad", "", "fine"], return_exceptions=True)
    assert isinstance(results[0], Response)
    assert isinstance(results[3], Response)
    assert (results[0].text, results[3].text) == ("good", "fine")
    assert isinstance(results[1], EngineError)
    assert isinstance(results[2], InvalidRequestError)
    assert (results[1].index, results[2].index) == (1, 2)


def test_a_wrong_prompt_in_a_list_is_found_before_anything_is_sent(scripted: Scripted) -> None:
    """A list with a prompt that cannot be one raises with its position and sends nothing."""
    bridge, engine = scripted()
    with pytest.raises(InvalidRequestError) as caught:
        bridge.infer(["good", ""])
    assert caught.value.index == 1
    assert engine.started == []


def test_a_list_shares_one_deadline(scripted: Scripted) -> None:
    """timeout= limits the whole list, not each prompt, and nothing goes on generating afterwards."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    with pytest.raises(RequestTimeoutError):
        bridge.infer(["a b", "c d", "e f"], timeout=0.2)
    engine.wait_for(lambda e: e.active == 0)


def test_progress_bar(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """progress=True shows how many prompts are done."""
    bridge, _ = scripted()
    bridge.infer(["a", "b", "c"], progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_full_queue_rejects_somebody_else(scripted: Scripted) -> None:
    """With when_full='reject' a caller who finds no room is told at once, with a hint when to try again."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1, when_full="reject")
    running = bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    waiting = bridge.submit("waiting")
    with pytest.raises(QueueFullError, match="max_pending=1") as caught:
        bridge.infer("one too many")
    assert caught.value.retry_after > 0
    assert caught.value.retryable
    engine.step()
    engine.wait_for(lambda e: len(e.started) == 2)
    engine.step()
    assert [running.result(10).text, waiting.result(10).text] == ["running", "waiting"]


def test_a_full_queue_blocks_up_to_the_deadline(scripted: Scripted) -> None:
    """With when_full='block' a caller waits for room, gets it when some falls free, and keeps its deadline."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    first = bridge.submit("first")
    engine.wait_for(lambda e: e.active == 1)
    second = bridge.submit("second")
    with pytest.raises(RequestTimeoutError):
        bridge.infer("late", timeout=0.1)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(bridge.infer, "third")
        for number in range(3):
            engine.wait_for(lambda e, n=number: len(e.started) == n + 1)  # type: ignore[misc]
            engine.step()
        assert [first.result(10).text, second.result(10).text, third.result(10).text] == ["first", "second", "third"]


def test_clients_take_turns(scripted: Scripted) -> None:
    """A client with many prompts does not keep another client's first one waiting for more than a turn."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    greedy = [bridge.submit(f"greedy {number}", client="greedy") for number in range(10)]
    engine.wait_for(lambda e: e.active == 1)
    bridge.submit("modest", client="modest", request_id="modest")
    while "modest" not in engine.started:
        engine.wait_for(lambda e: e.active == 1)
        engine.step(2)
    assert engine.started.index("modest") <= 2
    for future in greedy:
        future.cancel()


def test_a_higher_priority_goes_first(scripted: Scripted) -> None:
    """priority= overtakes what waits, of the same client too."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    futures = [bridge.submit("low", request_id="low"), bridge.submit("high", request_id="high", priority=5)]
    engine.step()
    engine.wait_for(lambda e: len(e.started) == 2)
    assert engine.started[1] == "high"
    for future in futures:
        future.cancel()
