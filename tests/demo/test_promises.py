"""The promises on a real model under transformers; faults are injected into the model's forward."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from examples.demo_model import world
from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    RequestAbortedError,
    RequestTimeoutError,
    Stream,
)
from lmbridge.engines.transformers import TransformersEngine
from tests.conftest import until

STORY = "Tell me a long story about a fox."


class Workshop:
    """Builds engines for a bridge, and can put a fault into the newest one's model."""

    def __init__(self) -> None:
        self.engines: list[TransformersEngine] = []

    def __call__(self) -> TransformersEngine:
        self.engines.append(TransformersEngine("demo", max_batch_size=8))
        return self.engines[-1]

    def before_each_step(self, act: Callable[[], None]) -> None:
        """Have the model call ``act`` before each forward from now on."""
        core = self.engines[-1]._core
        assert core is not None
        model: Any = core.runner._model  # type: ignore[attr-defined]
        forward = model.forward

        def faulty(*args: Any, **kwargs: Any) -> Any:
            act()
            return forward(*args, **kwargs)

        model.forward = faulty


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def bridge(workshop: Workshop) -> Iterator[Bridge]:
    with Bridge(workshop, stall_timeout=None) as bridge:
        yield bridge


def _break(bridge: Bridge, stream: Stream) -> None:
    for _ in stream:
        break


def _close(bridge: Bridge, stream: Stream) -> None:
    next(stream)
    stream.close()


def _abort_id(bridge: Bridge, stream: Stream) -> None:
    next(stream)
    bridge.abort(stream.request_id)
    with pytest.raises(RequestAbortedError):
        list(stream)


@pytest.mark.parametrize("leave", [_break, _close, _abort_id])
def test_leaving_stops_within_two_steps(
    bridge: Bridge, workshop: Workshop, leave: Callable[[Bridge, Stream], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving stops the generation within two more steps of the server's reading of it, and frees the cache."""
    engine = workshop.engines[0]
    read_at: list[float] = []
    abort = engine.abort_request

    def noted(request_id: str) -> None:
        read_at.append(engine.stats()["tokens"])
        abort(request_id)

    monkeypatch.setattr(engine, "abort_request", noted)
    stream = bridge.stream(STORY)
    leave(bridge, stream)
    until(lambda: not bridge.stats()["in_flight"] and bridge.stats()["cache_free"] == 1.0)
    bridge.infer("What is 2 + 3?")  # whatever was still under way has been counted by the time this has ended
    spent = bridge.stats()["tokens"] - read_at[0] - bridge.infer("What is 2 + 3?").usage.completion_tokens
    assert spent <= 2


def test_dropping_and_cancelling_stop(bridge: Bridge) -> None:
    """A dropped stream and a cancelled future do not go on generating."""
    stream = bridge.stream(STORY)
    next(stream)
    del stream
    gc.collect()
    future = bridge.submit(STORY)
    until(future.running)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    until(lambda: not bridge.stats()["in_flight"])
    assert bridge.infer("What is the capital of Peru?").text == "The capital of Peru is Lima."


def test_deadline(bridge: Bridge, workshop: Workshop) -> None:
    """A deadline ends the call with the text so far, also while a step hangs, and the engine goes on afterwards."""
    hang = threading.Event()
    seen = threading.Event()
    steps = iter(range(10**9))

    def hang_after_ten() -> None:
        if next(steps) >= 10:
            seen.set()
            hang.wait(60)

    workshop.before_each_step(hang_after_ten)
    with pytest.raises(RequestTimeoutError) as caught:
        bridge.infer(STORY, timeout=2.0)
    assert seen.is_set()
    assert caught.value.partial
    hang.set()
    assert bridge.infer("What is 2 + 3?").text == "2 + 3 = 5."


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("x " * 5000, {}, PromptTooLongError),
        ([10**6], {}, InvalidRequestError),
        ([{"role": "user", "content": 5}], {}, InvalidRequestError),
        ("", {}, InvalidRequestError),
        ("fine", {"top_p": 7}, InvalidRequestError),
    ],
)
def test_poison_fails_alone(bridge: Bridge, prompt: Any, options: dict[str, Any], error: type[Exception]) -> None:
    """A bad request raises for its own caller; the story that runs beside it comes out whole."""
    with ThreadPoolExecutor(1) as pool:
        story = pool.submit(bridge.infer, STORY)
        with pytest.raises(error):
            bridge.infer(prompt, **options)
        assert "fox" in story.result(60).text


def test_a_fault_in_the_model_is_repaired(bridge: Bridge, workshop: Workshop) -> None:
    """When a step raises, begun requests fail as retryable with their text; a new engine answers the waiting ones."""
    steps = iter(range(10**9))

    def fail_at_twenty() -> None:
        if next(steps) == 20:
            raise RuntimeError("device lost")

    workshop.before_each_step(fail_at_twenty)
    begun = [bridge.submit(STORY) for _ in range(8)]
    waiting = bridge.submit("What is the capital of Japan?")
    errors = [future.exception(60) for future in begun]
    assert all(isinstance(error, EngineDeadError) and error.retryable and error.partial for error in errors)
    assert waiting.result(60).text == "The capital of Japan is Tokyo."
    assert len(workshop.engines) == 2


@pytest.mark.timeout(180)
def test_a_hanging_step_is_noticed(workshop: Workshop) -> None:
    """An engine whose step never returns is taken for dead after stall_timeout, left behind and replaced."""
    release = threading.Event()
    with Bridge(workshop, stall_timeout=1.0) as bridge:
        workshop.before_each_step(partial(_wait, release))
        begun = bridge.submit(STORY)
        assert isinstance(begun.exception(60), EngineDeadError)
        assert bridge.infer("What is 2 + 3?", timeout=60).text == "2 + 3 = 5."
        release.set()  # and the thread that was left behind ends while there is a loop to hear of it
        until(lambda: not any(thread.name == "lmbridge late end" for thread in threading.enumerate()))


def test_close_with_work_in_flight(workshop: Workshop) -> None:
    """close() ends streams, futures and waiting calls at once, and leaves no thread."""
    with Bridge(workshop) as bridge, ThreadPoolExecutor(1) as pool:
        stream, future = bridge.stream(STORY), bridge.submit(STORY)
        waiting = pool.submit(bridge.infer, STORY)
        next(stream)
        bridge.close()
        assert isinstance(future.exception(10), BridgeClosedError)
        assert isinstance(waiting.exception(10), BridgeClosedError)
        with pytest.raises(BridgeClosedError):
            list(stream)


def test_swap_under_load(bridge: Bridge, workshop: Workshop) -> None:
    """The model is exchanged while 32 threads ask; no request fails, and every answer is right."""
    swapped = threading.Event()

    def ask(country: str) -> bool:
        right = True
        while not swapped.is_set():
            right &= world.CAPITALS[country] in bridge.infer(f"What is the capital of {country}?").text
        return right

    with ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask, country) for country in list(world.CAPITALS)[:32]]
        bridge.swap(workshop)
        swapped.set()
        assert all(call.result(60) for call in asking)
    assert len(workshop.engines) == 2
    until(lambda: workshop.engines[0]._core is None)  # the old one is closed when its last request has ended


def _wait(event: threading.Event) -> None:
    event.wait(120)
