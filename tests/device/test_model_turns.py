"""The transformers engine takes a turn for each run of its model, and gives it back whatever becomes of the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lmbridge.engines.transformers.starting
import lmbridge.server.sweep
from lmbridge import Bridge, Device, EngineDeadError, EngineError
from lmbridge.device.turns import Party
from lmbridge.engines.transformers import TransformersEngine
from tests.conftest import until
from tests.device.embedding import Products

LONG = "Write a long story."
RUNNERS = ["paged", "plain"]
PAGED_MOSTLY = ["paged", pytest.param("plain", marks=pytest.mark.long)]


class Demo:
    """A factory of engines of the bundled model; ``step`` is called in each run of the first one's."""

    def __init__(self, runner: str) -> None:
        self.built: list[TransformersEngine] = []
        self._runner = runner

    def __call__(self) -> TransformersEngine:
        self.built.append(TransformersEngine("demo", runner=self._runner))
        return self.built[-1]

    def each_step(self, step: Callable[[], object]) -> None:
        core: Any = self.built[0]._core
        core.runner._model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: step() and None)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def demo(runner: str) -> Demo:
    return Demo(runner)


@pytest.fixture
def bridge(demo: Demo, device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.05)
    with Bridge(demo, device=device, stall_timeout=1.0) as bridge:
        yield bridge


@pytest.fixture
def other(device: Device) -> Iterator[Party]:
    """Another engine's right to turns."""
    party = Party(device.turns, device.turns.lane(1.0))
    yield party
    party.close()


def take_a_turn(party: Party) -> None:
    """At once, or within the bound of a look."""

    def take() -> None:
        with party.turn():
            pass

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("runner", RUNNERS)
def test_each_run_is_a_turn(bridge: Bridge, device: Device, demo: Demo, other: Party) -> None:
    """The model would compute in the midst of another's turn."""
    together: list[bool] = []
    demo.each_step(lambda: together.append(device.turns._holder is None or device.turns._holder.party is other))
    with bridge.stream(LONG, max_new_tokens=40, ignore_eos=True) as stream:
        for _ in stream:
            take_a_turn(other)
    assert len(together) >= 40
    assert not any(together)
    (party,) = device.status().parties
    assert party.seconds > 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_model_that_raises_gives_its_turn_back(bridge: Bridge, demo: Demo, other: Party) -> None:
    """A run that fails would leave the device to nobody."""

    def fail() -> None:
        raise RuntimeError("CUDA error: not really")

    demo.each_step(fail)
    assert isinstance(bridge.submit(LONG).exception(60), (EngineDeadError, EngineError))
    take_a_turn(other)


@pytest.mark.parametrize("runner", ["plain"])
def test_what_is_no_exception_gives_the_turn_back(bridge: Bridge, demo: Demo, other: Party) -> None:
    """torch calls no hook for it, and the device would be held by a request that has ended."""

    def leave() -> None:
        raise SystemExit(3)

    demo.each_step(leave)
    assert isinstance(bridge.submit(LONG).exception(60), EngineError)
    take_a_turn(other)


@pytest.mark.parametrize("runner", PAGED_MOSTLY)
def test_a_step_that_hangs_holds_no_other_model(
    bridge: Bridge, demo: Demo, other: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that never returns would stall every model on the device, and not only its own."""
    monkeypatch.setattr(lmbridge.engines.transformers.starting, "CLOSE_TIMEOUT", 0.2)
    release = threading.Event()
    demo.each_step(lambda: release.wait(60) and None)
    begun = bridge.submit(LONG)
    take_a_turn(other)
    assert isinstance(begun.exception(60), EngineDeadError)
    assert bridge.infer("What is 2 + 3?", timeout=60).text == "2 + 3 = 5."
    release.set()


@pytest.mark.parametrize("runner", PAGED_MOSTLY)
def test_waiting_for_a_turn_is_no_stall(bridge: Bridge, demo: Demo, other: Party, device: Device) -> None:
    """A model whose turn does not come, another's batch being long, would be taken for dead and loaded again."""
    with other.turn():
        answer = bridge.submit("What is 2 + 3?")
        until(lambda: device.turns.line())
        waiting = threading.Event()
        assert not waiting.wait(2.0)  # twice as long as it may stand still
        assert bridge.state == "ready"
    assert answer.result(60).text == "2 + 3 = 5."
    assert len(demo.built) == 1


def test_a_stream_beside_a_large_job(device: Device) -> None:
    """One of them would wait for the other's end."""
    with Bridge("demo", device=device) as model, Bridge(lambda: Products(64), device=device) as encoder:
        encoder.map([8] * 64)
        answers = [encoder.submit_call(8) for _ in range(500)]
        text = model.infer(LONG, max_new_tokens=50, ignore_eos=True, timeout=60)
        assert text.usage.completion_tokens == 50
        assert all(answer.result(60) == 8 for answer in answers)
        assert {party.label for party in device.status().parties if party.seconds} == {"demo", "<lambda>"}
