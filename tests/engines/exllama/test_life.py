"""Aborts, deadlines, failures and ends of the ExLlama engines, on their real generators."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import pytest

from lmbridge import Bridge, EngineDeadError, EngineError, EngineStartError, PromptTooLongError, RequestTimeoutError
from lmbridge.engines.exllama import engine as life
from lmbridge.testing.witness import WitnessedEngines
from tests.engines.exllama.conftest import Make, need
from tests.engines.exllama.scripted_cuda import PAGE, script

need("exllamav2", "exllamav3")

PATIENCE = 30.0
SPLIT = [20.0, 24.0]
V2_LOADS: list[tuple[dict[str, Any], str, tuple[Any, ...], dict[str, Any]]] = [
    ({"device": "cuda:1"}, "load", ([0.0, 1e6],), {}),
    ({"gpu_split": SPLIT}, "load", (SPLIT,), {}),
    ({"gpu_split": SPLIT, "tp": 2}, "load_tp", (SPLIT,), {}),
    ({"cache_bits": 4}, "load_autosplit", (), {}),
]
V3_LOADS: list[tuple[dict[str, Any], str, tuple[Any, ...], dict[str, Any]]] = [
    ({"device": "cuda:1"}, "load", (), {"device": "cuda:1"}),
    ({"gpu_split": SPLIT}, "load", (), {"use_per_device": SPLIT}),
    ({"gpu_split": SPLIT, "tp": 2}, "load", (), {"use_per_device": SPLIT, "tensor_p": True}),
    ({"cache_bits": 4}, "load", (), {"device": None}),
]
"""Options, the library's way of loading, and what that is given."""


def inner(engines: WitnessedEngines) -> Any:
    """ExLlama's generator in the latest engine."""
    engine: Any = engines.latest.engine
    return engine._model.generator


def free_pages(generator: Any) -> int:
    """Pages that no job holds."""
    return len(getattr(generator, "pagetable", generator).unreferenced_pages)


def test_an_abort_gives_the_pages_back(make: Make) -> None:
    """A visitor who leaves gives back what the answer held, and the others' answers go on."""
    with Bridge(engines := WitnessedEngines(make)) as bridge:
        generator = inner(engines)
        free = free_pages(generator)
        streams = [bridge.stream(f"go on and on, {number}") for number in range(3)]
        next(streams[0])
        for stream in streams:
            stream.close()
        assert bridge.infer("hello!", timeout=PATIENCE).finish_reason == "stop"
        assert engines.latest.in_flight(PATIENCE) == 0
        assert generator.num_remaining_jobs() == 0
        assert free_pages(generator) == free


def test_an_abort_after_the_end_does_nothing(bridge: Bridge) -> None:
    """Closing a stream that has been read to its end harms nobody; V2's own cancel asserts then."""
    stream = bridge.stream("hello!", timeout=PATIENCE)
    text = "".join(delta.text for delta in stream)
    stream.close()
    assert bridge.infer("hello!", timeout=PATIENCE).text == text


def test_the_bridge_lives_while_a_step_hangs(make: Make) -> None:
    """A step that takes long holds neither deadlines up, nor aborts, nor what tells of the engine's health."""
    with Bridge(make) as bridge:
        stream = bridge.stream("go on and on")
        next(stream)
        script.gate.clear()
        begin = time.monotonic()
        with pytest.raises(RequestTimeoutError):
            bridge.infer("hello!", timeout=0.2)
        stream.close()
        assert stream.response.finish_reason == "abort"
        assert time.monotonic() - begin < 5
        script.gate.set()
        assert bridge.infer("hello!", timeout=PATIENCE).text


def test_a_failed_step_is_told_and_a_new_engine_follows(make: Make) -> None:
    """Nobody waits for a generator that has failed; the next request is answered by a new one."""
    with Bridge(engines := WitnessedEngines(make)) as bridge:
        stream = bridge.stream("go on and on", timeout=PATIENCE)
        next(stream)
        script.failure = RuntimeError("no page is left")
        begin = time.monotonic()
        with pytest.raises(EngineDeadError, match="no page is left") as caught:
            list(stream)
        assert caught.value.retryable
        assert time.monotonic() - begin < 1
        assert bridge.infer("hello!", timeout=PATIENCE).text
        assert len(engines.witnesses) == 2


def test_a_refused_job_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ExLlama does not take is an error of that request; V2's own wrapper would spin on it for ever."""
    with Bridge(engines := WitnessedEngines(make)) as bridge:
        generator = inner(engines)
        other = bridge.stream("go on and on", max_new_tokens=100)
        next(other)

        def refuse(job: Any) -> None:
            raise AssertionError("Job requires 9 pages (only 8 available)")

        with monkeypatch.context() as patch:
            patch.setattr(generator, "enqueue", refuse)
            with pytest.raises(EngineError, match="only 8 available"):
                bridge.infer("hello!", timeout=PATIENCE)
        list(other)
        assert other.response.finish_reason == "length"
        assert len(engines.witnesses) == 1


def test_a_prompt_that_does_not_fit_makes_no_job(make: Make) -> None:
    """A prompt that is too long is refused by name, and the generator never sees it."""
    with Bridge(lambda: make(max_context=100)) as bridge:
        steps = script.steps
        with pytest.raises(PromptTooLongError, match="room for 100"):
            bridge.infer("x" * 200, timeout=PATIENCE)
        assert script.steps == steps
        answer = bridge.infer("x" * 50, raw=True, timeout=PATIENCE)
        assert answer.finish_reason == "length"
        assert answer.usage.total_tokens == 100


def test_an_answer_may_fill_the_cache(make: Make) -> None:
    """The last page is used to its end, in which the libraries differ."""
    with Bridge(lambda: make(cache_tokens=2 * PAGE)) as bridge:
        answer = bridge.infer("x" * 100, raw=True, max_new_tokens=5000, timeout=PATIENCE)
        assert answer.finish_reason == "length"
        assert 2 * PAGE - 1 <= answer.usage.total_tokens <= 2 * PAGE
        assert bridge.infer("x" * 100, raw=True, max_new_tokens=5000, timeout=PATIENCE).text == answer.text


def test_more_requests_than_the_cache_holds_wait_their_turn(make: Make) -> None:
    """Requests that the cache has no room for come later, and are not taken for forgotten meanwhile."""
    with Bridge(lambda: make(cache_tokens=4 * PAGE), stall_timeout=2) as bridge:
        answers = bridge.infer([f"go on {number}" for number in range(12)], max_new_tokens=200, timeout=PATIENCE)
        assert {answer.finish_reason for answer in answers} == {"length"}


def test_a_model_that_cannot_answer_does_not_start(make: Make) -> None:
    """A model that fails its first request is no engine; the error says why, and its memory is freed."""
    script.failure = RuntimeError("no kernel image is available for execution on the device")
    with pytest.raises(EngineStartError, match="no kernel image"), Bridge(make):
        pass


def test_a_model_that_hangs_is_left_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing ends also while a step hangs."""
    monkeypatch.setattr(life, "CLOSE_TIMEOUT", 0.2)
    before = set(threading.enumerate())
    with Bridge(make) as bridge:
        next(bridge.stream("go on and on"))
        script.gate.clear()
        bridge.close()
    script.gate.set()
    for thread in set(threading.enumerate()) - before:
        if "exllama" in thread.name:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    script.loaded = 0


def test_one_failed_prompt_leaves_v3_alive(make: Make, way: str) -> None:
    """V3 contains the failure of one prompt, and so do we; with V2 the engine is built anew."""
    with Bridge(engines := WitnessedEngines(make)) as bridge:
        script.gate.clear()  # before the prompt's first step
        failed = bridge.submit("hello there!")
        script.failure = ValueError("an image that is none")
        script.gate.set()
        assert isinstance(failed.exception(PATIENCE), EngineError)
        assert bridge.infer("hello!", timeout=PATIENCE).text
        assert len(engines.witnesses) == (1 if way == "v3" else 2)


def test_a_lost_device_is_the_engines_end(make: Make) -> None:
    """After a CUDA error each prompt would fail, by itself as V3 sees it: the engine ends, and says what helps."""
    with Bridge(make) as bridge:
        script.gate.clear()
        failed = bridge.submit("hello there!")
        script.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
        script.gate.set()
        assert isinstance(failed.exception(PATIENCE), EngineDeadError)
        with pytest.raises(EngineDeadError, match="restart the process"):
            bridge.infer("hello!", timeout=PATIENCE)


def test_the_options_reach_the_loader(make: Make, way: str) -> None:
    """One GPU, a split, layers spread over GPUs, and a narrow cache come out as the library wants them."""
    for options, how, given, named in V3_LOADS if way == "v3" else V2_LOADS:
        with Bridge(functools.partial(make, **options)) as bridge:
            assert bridge.infer("hello!", timeout=PATIENCE).text
        assert script.loads[-1][:2] == (how, given)
        assert named.items() <= script.loads[-1][2].items()


def test_the_numbers_are_told(bridge: Bridge) -> None:
    """Operators see how much was generated."""
    answer = bridge.infer("hello!", timeout=PATIENCE)
    stats = bridge.stats()
    assert stats["in_flight"] == 0
    assert stats["tokens"] >= answer.usage.completion_tokens - 1
    assert stats["steps"] > 0
