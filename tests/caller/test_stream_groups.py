"""Several answers read by one thread: each whole, in the order they come, and ended together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import lmbridge.server.sweep
from lmbridge import Bridge, BridgeClosedError, GenerationConfig, InvalidRequestError, RequestTimeoutError
from lmbridge.testing import ScriptedEngine
from tests.conftest import until


def test_each_answer_arrives_under_its_own_index() -> None:
    """Mixed up indices would put one choice's words into another's."""
    prompts = [f"prompt {n} has words of its own {n}" for n in range(20)]
    with Bridge(ScriptedEngine()) as bridge:
        texts = [""] * len(prompts)
        ends = []
        for index, delta in bridge.stream_many(prompts):
            texts[index] += delta.text
            ends += [index] if delta.finish_reason else []
    assert texts == prompts
    assert sorted(ends) == list(range(20))


def test_the_same_prompt_several_times() -> None:
    """n choices of one prompt are n answers, whole in ``responses`` after the end."""
    with Bridge(ScriptedEngine()) as bridge:
        group = bridge.stream_many(["one two"] * 3)
        assert len(list(group)) >= 3
        assert [response.text for response in group.responses] == ["one two"] * 3  # type: ignore[union-attr]
        assert len(set(group.request_ids)) == 3


def test_one_that_fails_leaves_the_others() -> None:
    """An error belongs to one answer; raising it would lose the others."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        group = bridge.stream_many(["a b", "bad", "c d"])
        engine.fail("bad", ValueError("poison"))
        engine.wait_for(lambda engine: engine.active == 3)
        engine.step(3)
        errors = {index: delta.error for index, delta in group if delta.error is not None}
        assert list(errors) == [1]
        first, second, third = group.responses
    assert [getattr(answer, "text", None) for answer in (first, third)] == ["a b", "c d"]
    assert "poison" in repr(getattr(second, "__cause__", None))


def test_leaving_stops_all_of_them() -> None:
    """``break`` must free the engine of every answer, even while the group is held."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        group = bridge.stream_many(["a b c"] * 4)
        engine.wait_for(lambda engine: engine.active == 4)
        engine.step()
        for _ in group:
            break
        engine.wait_for(lambda engine: len(engine.aborted) == 4)


def test_closing_from_another_thread_ends_the_reader() -> None:
    """An HTTP client that went away is noticed on another thread than the one that reads."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        group = bridge.stream_many(["a b c"] * 2)
        engine.wait_for(lambda engine: engine.active == 2)
        closer = threading.Thread(target=group.close)
        closer.start()
        assert [delta.finish_reason for _, delta in group] == ["abort", "abort"]
        closer.join()


def test_a_group_shares_one_deadline() -> None:
    """The deadline ends every answer, each with what it had."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        group = bridge.stream_many(["a b", "c d"], timeout=0.2)
        engine.wait_for(lambda engine: engine.active == 2)
        engine.step()
        errors = [delta.error for _, delta in group if delta.error is not None]
        assert [type(error) for error in errors] == [RequestTimeoutError] * 2
        assert [error.partial for error in errors if error] == ["a", "c"]


def test_waiting_gives_up_in_time_and_loses_nothing() -> None:
    """A heartbeat is sent when ``wait`` says False; the next delta must still come."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        with bridge.stream_many(["a b"]) as group, bridge.stream("a b") as stream:
            engine.wait_for(lambda engine: engine.active == 2)
            assert [group.wait(0.01), stream.wait(0.01)] == [False, False]
            engine.step(2)
            assert [group.wait(10), stream.wait(10)] == [True, True]
            assert "".join(delta.text for _, delta in group) == "a b"
            assert "".join(delta.text for delta in stream) == "a b"
        assert stream.wait(0)  # at the end ``next`` does not block either


def test_closing_the_bridge_ends_the_group() -> None:
    """Whoever reads a group when the bridge is closed is told why it ended."""
    engine = ScriptedEngine(manual=True)
    bridge = Bridge(engine).start()
    group = bridge.stream_many(["a b"] * 2)
    engine.wait_for(lambda engine: engine.active == 2)
    bridge.close()
    assert [type(delta.error) for _, delta in group] == [BridgeClosedError] * 2


def test_one_prompt_is_refused() -> None:
    """A text given for a list would be read letter by letter."""
    with Bridge(ScriptedEngine()) as bridge, pytest.raises(InvalidRequestError, match="list of prompts"):
        bridge.stream_many("text")  # type: ignore[arg-type]


def test_each_may_have_a_config_and_a_name_of_its_own() -> None:
    """n choices need n seeds; and logs name each of them after the request they belong to."""
    with Bridge(ScriptedEngine()) as bridge:
        configs = [GenerationConfig(max_new_tokens=1), GenerationConfig(max_new_tokens=2)]
        group = bridge.stream_many(["a b c"] * 2, configs, request_id="mine")
        list(group)
        assert [response.text for response in group.responses] == ["a", "a b"]  # type: ignore[union-attr]
        assert group.request_ids == ["mine-0", "mine-1"]
        with pytest.raises(InvalidRequestError, match="1 configs for 2 prompts"):
            bridge.stream_many(["a", "b"], configs[:1])


def works_on(number: int, engine: ScriptedEngine) -> bool:
    """Whether the engine works on its ``number``-th request."""
    return len(engine.started) >= number and engine.active == 1


def test_a_reader_who_takes_his_time_loses_no_prompt(
    scripted: Callable[..., tuple[Bridge, ScriptedEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that was given its place while nobody read is sent when the reader comes back, however late."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.001)
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    group = bridge.stream_many(["one", "two", "three"])
    engine.wait_for(lambda e: e.active == 1)
    engine.step(1)
    sweep = bridge._server_thread.keeper.run.loop.sweep  # type: ignore[union-attr]
    until(lambda: any(looks > lmbridge.server.sweep.LOST_LOOKS for looks in sweep._missing.values()))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, group)
        for number in (2, 3):
            engine.wait_for(partial(works_on, number))
            engine.step(1)
        assert sorted(index for index, delta in reading.result(20) if delta.finish_reason == "stop") == [0, 1, 2]
