"""Bridges that share the memory of a device: who loads, who waits, who makes room, and that nobody hangs."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import lmbridge.device.ledger
import lmbridge.server.places
import lmbridge.server.supervisor
import lmbridge.server.sweep
import lmbridge.server.watchdog
from lmbridge import (
    Bridge,
    BridgeClosedError,
    Device,
    EngineDeadError,
    EngineStartError,
    InvalidRequestError,
    RequestTimeoutError,
    function_engine,
)
from lmbridge.device.turns import Party
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.device.sized import GB, Model, Sized, held
from tests.server.workshop import Blocked, in_thread, turns

Build = Callable[..., Bridge]


@pytest.fixture
def on() -> Iterator[Build]:
    """Builds bridges that end with the test."""
    bridges: list[Bridge] = []

    def build(model: Model | Bridge, device: Device | None = None, **options: object) -> Bridge:
        bridge = model if isinstance(model, Bridge) else model.on(device or Device(), **options)
        bridges.append(bridge)
        return bridge

    yield build
    for bridge in bridges:
        bridge.close()


def on_device(bridge: Bridge) -> Party:
    """What its engine has on its device."""
    engine = bridge._server_thread.engine
    assert engine is not None
    assert isinstance(engine.party, Party)
    return engine.party


def count_looks(bridge: Bridge) -> list[float]:
    """One entry for each time that the supervisor sees what there is to do, from now on."""
    run = bridge._server_thread.keeper.run
    assert run is not None
    looks: list[float] = []
    rest = run.supervisor._rest
    patience = rest.patience

    def counted() -> float | None:
        looks.append(time.monotonic())
        return patience()

    rest.patience = counted  # type: ignore[method-assign]
    return looks


def waits(bridge: Bridge) -> str:
    """What its load waits for, once it does."""
    until(lambda: "waiting" in bridge.health().reason)
    return bridge.health().reason


# --- room ---


def test_models_that_fit_stay(on: Build) -> None:
    """Models would be unloaded and loaded again though there is room for all of them."""
    device, models = Device(memory="3GB"), [Model(name) for name in "abc"]
    bridges = [on(model, device) for model in models]
    for _ in range(3):
        for bridge in bridges:
            bridge.infer("hello")
    assert [len(model.built) for model in models] == [1, 1, 1]
    assert held(device) == {"a": GB, "b": GB, "c": GB}
    status = device.status()
    assert (status.name, status.memory, status.reserved, status.free) == ("cpu", 3 * GB, 3 * GB, 0)
    assert (status.loads, status.unloads, status.loading) == (3, 0, None)


def test_the_one_that_was_not_used_for_longest_goes(on: Build) -> None:
    """The model that is asked again next would have to be loaded again."""
    device, models = Device(memory="2GB"), [Model(name) for name in "abc"]
    a, b, c = (on(model, device) for model in models)
    for bridge in (a, b, a):
        bridge.infer("hello")
    c.infer("hello")
    assert (a.state, b.state, c.state) == ("ready", "unloaded", "ready")
    assert b.health().reason == "c needs the memory; the next call loads it again"
    assert models[1].built[0].closed
    assert held(device) == {"a": GB, "c": GB}
    assert b.infer("and again").text == "and again"  # which is to say that a is not there any more
    assert (a.state, len(models[1].built), device.status().unloads) == ("unloaded", 2, 2)


def test_as_many_go_as_are_needed(on: Build) -> None:
    """A large model would wait for ever, or all the others would be unloaded for a small one."""
    device = Device(memory="4GB")
    small = [on(Model(name), device) for name in "abcd"]
    for bridge in small:
        bridge.infer("hello")
    on(Model("large", 2 * GB), device).infer("hello")
    assert [bridge.state for bridge in small] == ["unloaded", "unloaded", "ready", "ready"]


def test_what_is_measured_counts(on: Build) -> None:
    """An estimate that was too high would keep others out for good, one that was too low let too many in."""
    device = Device(memory="4GB")
    a, b, c = (on(Model(*sizes), device) for sizes in (("a", 3 * GB, GB), ("b", GB, 3 * GB), ("c", GB)))
    a.infer("hello")
    assert held(device) == {"a": GB}
    b.infer("hello")
    assert held(device) == {"a": GB, "b": 3 * GB}
    c.infer("hello")
    assert held(device) == {"b": 3 * GB, "c": GB}


def test_a_model_that_turns_out_larger(on: Build, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody would know why the device runs out of memory."""
    on(Model("greedy", GB, 3 * GB), device := Device(memory="2GB")).infer("hello")
    assert "exceed the memory limit by 1.0 GB on cpu; greedy turned out to need 3.0 GB" in caplog.text
    assert device.status().free == -GB


def test_engines_that_do_not_know_reserve_nothing(on: Build) -> None:
    """An engine that cannot tell its size would be kept out, or keep others out."""
    device = Device(memory="1GB")
    unknown = on(Model("unknown", None), device)
    on(Model("a"), device).infer("hello")
    assert unknown.infer("hello").text == "hello"
    assert held(device) == {"a": GB}


@pytest.mark.parametrize("answer", [ValueError("not known"), SystemExit(3), "a lot", -5, float("nan"), True])
def test_an_estimate_that_is_none(answer: object, on: Build) -> None:
    """An engine that misjudges itself would not be loaded, or take the server along."""

    class Strange(ScriptedEngine):
        def estimate(self) -> int | None:
            if isinstance(answer, BaseException):
                raise answer
            return answer  # type: ignore[return-value]

        footprint = estimate

    device = Device(memory="1GB")
    assert on(Bridge(Strange, device=device)).infer("hello").text == "hello"
    assert device.status().reserved == 0


# --- what can never fit ---


def test_a_model_larger_than_the_device(on: Build) -> None:
    """Its callers would wait for room that there will never be."""
    bridge = on(Model("large", 3 * GB), Device(memory="2GB"))
    why = r"large needs 3\.0 GB of cpu, where models may use 2\.0 GB\. Give it a smaller dtype or, if it has a cache,"
    with pytest.raises(EngineStartError, match=why):
        bridge.infer("hello")
    assert bridge.state == "failed"


def test_a_model_that_pinned_ones_leave_no_room_for(on: Build) -> None:
    """The same, though the device would be large enough without them."""
    device = Device(memory="2GB")
    on(Model("pinned"), device, pin=True).infer("hello")
    on(Bridge(Sized(GB // 2), device=device)).infer("hello")
    with pytest.raises(EngineStartError, match=r"of which stay in use: pinned \(1\.0 GB\), scripted \(500\.0 MB\)\. "):
        on(Model("other"), device).start()
    on(Model("small", GB // 2), device).infer("hello")


def test_an_instance_is_never_unloaded(on: Build) -> None:
    """It could not be loaded again, and its callers would get errors from then on."""
    device = Device(memory="1GB")
    instance = on(Bridge(Sized(GB), device=device, keep_alive=0.0))
    instance.infer("hello")
    with pytest.raises(EngineStartError, match="pin fewer"):
        on(Model("other"), device).start()
    assert instance.infer("and on").text == "and on"


# --- waiting ---


def test_a_load_waits_for_those_who_work(on: Build) -> None:
    """A model at work would be unloaded under its callers; or nobody knew what the new one waits for."""
    device, model = Device(memory="2.5GB"), Model("busy", 2 * GB, manual=True)
    busy, other = on(model, device), on(Model("other"), device)
    running = busy.submit("one two")
    until(lambda: model.built and model.built[0].active)
    answer = other.submit("hello")
    assert waits(other) == "waiting for memory on cpu: needs 1.0 GB, 500.0 MB free, held by busy (2.0 GB)"
    assert other.state == "starting"
    with pytest.raises(RequestTimeoutError):
        other.infer("in a hurry", timeout=0.05)
    model.built[0].step(2)
    assert running.result(30).text == "one two"
    assert answer.result(30).text == "hello"
    assert (busy.state, other.health().reason) == ("unloaded", "")


def test_a_load_waits_for_another(on: Build) -> None:
    """Two that load at once would each find the memory that the other is about to take."""
    device, gate = Device(memory="9GB"), threading.Event()
    first, second = Model("first"), Model("second")
    first.gates = [gate]
    one, two = on(first, device), on(second, device)
    answer = one.submit("one")
    until(lambda: device.status().loading == "first")
    other = two.submit("two")
    assert waits(two) == "waiting until first is loaded on cpu"
    assert not second.built[0].started
    third = on(Model("third"), device)
    third.submit("three")
    assert waits(third) == "waiting until first is loaded on cpu"
    gate.set()
    assert (answer.result(30).text, other.result(30).text) == ("one", "two")


@pytest.mark.parametrize("memory", [None, "9GB"])
def test_a_load_that_hangs(on: Build, monkeypatch: pytest.MonkeyPatch, memory: str | None) -> None:
    """No other model could be loaded on its device for as long as the process lives."""
    device, gate = Device(memory=memory), threading.Event()
    hung = Model("hung")
    hung.gates = [gate]
    on(hung, device).submit("hello")
    until(lambda: device.status().loading == "hung")
    if memory:
        monkeypatch.setattr(lmbridge.device.ledger, "SLOW", 0.0)
    assert on(Model("other"), device).infer("hello", timeout=30).text == "hello"
    assert held(device) == {"hung": GB, "other": GB}
    gate.set()


def test_a_small_model_passes_a_large_one_that_waits(on: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model too large for now would keep all others out; or smaller ones that keep coming would keep it out."""
    device, model = Device(memory="4GB"), Model("busy", 2 * GB, manual=True)
    busy, large = on(model, device), on(Model("large", 3 * GB), device)
    busy.submit("never stepped")
    until(lambda: model.built and model.built[0].active)
    late = large.submit("hello")
    waits(large)
    assert on(Model("small"), device).infer("hello", timeout=30).text == "hello"
    assert held(device) == {"busy": 2 * GB, "small": GB}
    monkeypatch.setattr(lmbridge.device.ledger, "PATIENT", 0.0)
    next_ = on(Model("next"), device)
    answer = next_.submit("hello")
    assert waits(next_) == "waiting for memory on cpu, after large"
    busy.close()
    assert (late.result(30).text, answer.result(30).text) == ("hello", "hello")


@pytest.mark.parametrize("fits", [True, False])
def test_swapping_what_waits_for_memory(on: Build, fits: bool) -> None:
    """The user could not have a smaller model instead of one that waits; or a failed swap would end the wait for it."""
    device, model = Device(memory="4GB"), Model("busy", 2 * GB, manual=True)
    busy, large = on(model, device), on(Model("large", 3 * GB), device)
    running = busy.submit("one")
    until(lambda: model.built and model.built[0].active)
    answer = large.submit("hello")
    waits(large)
    if fits:
        in_thread(lambda: large.swap(Model("small"))).result(30)
        assert answer.result(30).text == "hello"
        assert held(device) == {"busy": 2 * GB, "small": GB}
        return
    with pytest.raises(EngineStartError, match=r"huge needs 5\.0 GB"):
        in_thread(lambda: large.swap(Model("huge", 5 * GB))).result(30)
    assert waits(large).endswith("held by busy (2.0 GB)")
    assert large.state == "starting"
    model.built[0].step()
    assert (running.result(30).text, answer.result(30).text) == ("one", "hello")


def test_closing_a_bridge_that_waits(on: Build) -> None:
    """close() would hang, or others wait behind it for ever."""
    device, model = Device(memory="1GB"), Model("busy", manual=True)
    busy = on(model, device)
    busy.submit("never stepped")
    until(lambda: model.built and model.built[0].active)
    waiting, behind = on(Model("waiting"), device), on(Model("behind", GB // 2), device)
    lost = waiting.submit("hello")
    waits(waiting)
    answer = behind.submit("hello")
    waits(behind)
    waiting.close()
    assert isinstance(lost.exception(30), BridgeClosedError)
    until(lambda: behind.health().reason.startswith("waiting for memory on cpu: needs 500.0 MB"))
    busy.close()
    assert answer.result(30).text == "hello"


def test_a_bridge_that_is_dropped_while_it_waits(on: Build) -> None:
    """Its place in the line, or what it has reserved, would be lost to all others."""
    device, model = Device(memory="1GB"), Model("busy", manual=True)
    busy = on(model, device)
    running = busy.submit("one")
    until(lambda: model.built and model.built[0].active)

    def drop() -> None:
        dropped = Model("dropped").on(device)
        with contextlib.suppress(RequestTimeoutError):
            dropped.start(timeout=0.05)
        waits(dropped)

    with pytest.warns(ResourceWarning):
        drop()
        gc.collect()
    model.built[0].step()
    running.result(30)
    assert on(Model("next"), device).infer("hello").text == "hello"


def test_a_drain_covers_the_wait_for_memory(on: Build) -> None:
    """What was asked before close(drain=True) would be lost because another model was busy."""
    device, model = Device(memory="1GB"), Model("busy", manual=True)
    busy, other = on(model, device), on(Model("other"), device)
    running = busy.submit("one")
    until(lambda: model.built and model.built[0].active)
    answer = other.submit("hello")
    waits(other)
    closing = in_thread(lambda: other.close(drain=True, timeout=30))
    until(lambda: other.state == "draining")
    model.built[0].step()
    closing.result(30)
    assert (running.result(30).text, answer.result(30).text) == ("one", "hello")


# --- unloaded, and back ---


def test_an_idle_model_is_unloaded(on: Build) -> None:
    """``keep_alive`` seconds after its last call a model would hold the memory still; or lose it while it is used."""
    device, model = Device(), Model("a", manual=True)
    bridge = on(model, device, keep_alive=0.05)
    running = bridge.submit("one two")
    until(lambda: model.built and model.built[0].active)
    model.built[0].step()
    other = on(Model("b"), Device(), keep_alive=0.05).start()  # begins to be idle after the call has begun
    until(lambda: other.state == "unloaded")
    turns(bridge)
    assert bridge.state == "ready"
    model.built[0].step()
    assert running.result(30).text == "one two"
    until(lambda: bridge.state == "unloaded")
    assert bridge.health().reason == "it was idle; the next call loads it again"
    until(lambda: model.built[0].closed)
    assert (device.status().reserved, device.status().unloads) == (0, 1)
    assert (bridge.requests(), bridge.stats(), bridge.describe(), bridge.supports()) == ([], {}, "a", frozenset())


def test_a_model_that_was_never_used_is_unloaded(on: Build) -> None:
    """One that was loaded by start() for nobody would stay for good."""
    bridge = on(Model("a"), keep_alive=0.01)
    bridge.start()
    until(lambda: bridge.state == "unloaded")
    assert bridge.infer("hello").text == "hello"


def test_keep_alive_zero(on: Build) -> None:
    """A model that is kept for no time at all would be unloaded before its first call, again and again."""
    model = Model("a")
    bridge = on(model, keep_alive=0.0)
    for _ in range(3):
        assert bridge.infer("hello", timeout=30).text == "hello"
        until(lambda: bridge.state == "unloaded")
    assert 3 <= len(model.built) <= 4  # the first call has it loaded before it is made, and may come too late


def test_a_model_that_is_kept_for_no_time_costs_nothing_while_it_works(on: Build) -> None:
    """The server thread would look without a pause at whether the call has ended."""
    model = Model("a", manual=True)
    bridge = on(model, keep_alive=0.0)
    running = bridge.submit("one")
    until(lambda: model.built and model.built[-1].active)
    looks = count_looks(bridge)
    turns(bridge, 200)
    assert len(looks) <= 2
    model.built[-1].step()
    assert running.result(30).text == "one"
    until(lambda: bridge.state == "unloaded")


def test_starting_what_is_unloaded(on: Build) -> None:
    """start() would say that the model is ready, though the next caller has to wait for it."""
    device, b = Device(memory="1GB"), Model("b")
    first, second = on(Model("a"), device), on(b, device)
    first.start()
    second.start()
    assert first.state == "unloaded"
    assert first.start(timeout=30).state == "ready"
    assert second.state == "unloaded"


def test_a_model_that_cannot_be_loaded_again(on: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failure, the memory of others not being free yet, would end the bridge; one that stays is told to callers."""
    monkeypatch.setattr(lmbridge.server.supervisor, "FIRST_BACKOFF", 0.01)
    model = Model("a")
    bridge = on(model, keep_alive=0.01)
    bridge.infer("hello")
    until(lambda: bridge.state == "unloaded")
    model.errors = [MemoryError("not yet")]
    assert bridge.infer("once more", timeout=30).text == "once more"
    until(lambda: bridge.state == "unloaded")
    model.errors = [OSError("gone")] * 5
    with pytest.raises(EngineDeadError, match="gone"):
        bridge.infer("hello", timeout=30)
    assert bridge.state == "failed"


@pytest.mark.parametrize("drain", [False, True])
def test_closing_what_is_unloaded(on: Build, drain: bool) -> None:
    """close() would load the model, or hang."""
    model = Model("a")
    bridge = on(model, keep_alive=0.01)
    bridge.infer("hello")
    until(lambda: bridge.state == "unloaded")
    bridge.close(drain=drain)
    assert (bridge.state, len(model.built)) == ("closed", 1)
    with pytest.raises(BridgeClosedError):
        bridge.infer("too late")


@pytest.mark.parametrize("overlap", [True, False])
def test_swapping_what_is_unloaded(on: Build, overlap: bool) -> None:
    """The new model would be told of an old one that serves; a failed swap would leave callers without either."""
    model = Model("a")
    bridge = on(model, device := Device(memory="1GB"), keep_alive=0.01)
    bridge.infer("hello")
    until(lambda: bridge.state == "unloaded")
    with pytest.raises(EngineStartError, match=r"no weights\. The next call loads the old model again\.$"):
        bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")), overlap=overlap)
    assert bridge.state == "unloaded"
    assert bridge.infer("who?").text == "who?"
    until(lambda: bridge.state == "unloaded")
    bridge.swap(Model("b", script=lambda request: ["new"]), overlap=overlap)
    assert bridge.infer("who?", timeout=30).text == "new"
    assert set(held(device)) <= {"b"}


# --- swaps ---


def test_a_swap_that_overlaps_counts_both(on: Build) -> None:
    """Two models would be loaded where there is room for one; or the swap wait for the model that it is to replace."""
    device = Device(memory="2GB")
    bridge = on(Model("old"), device)
    bridge.start()
    with pytest.raises(EngineStartError, match=r"of which stay in use: old \(1\.0 GB\)\. Use swap\(overlap=False\)"):
        bridge.swap(Model("new", 1_500_000_000))
    assert bridge.infer("and on").text == "and on"
    bridge.swap(Model("new", 1_500_000_000), overlap=False)
    assert held(device) == {"new": 1_500_000_000}


def test_a_swap_has_others_make_room(on: Build) -> None:
    """It would fail, or wait for ever, though an idle model is in its way."""
    device = Device(memory="2GB")
    idle, bridge = on(Model("idle"), device), on(Model("old"), device)
    idle.start()
    bridge.start()
    bridge.swap(Model("new"))
    assert idle.state == "unloaded"
    until(lambda: held(device) == {"new": GB})


def test_two_swaps_that_wait_for_each_other(on: Build) -> None:
    """Each has the memory that the other needs; neither would end."""
    device, models = Device(memory="2.5GB"), [Model("a", manual=True), Model("b", manual=True)]
    a, b = (on(model, device) for model in models)
    running = [bridge.submit("one") for bridge in (a, b)]
    until(lambda: all(model.built and model.built[0].active for model in models))
    first = in_thread(lambda: a.swap(Model("new a")))
    waits(a)
    second = in_thread(lambda: b.swap(Model("new b")))
    with pytest.raises(EngineStartError, match=r"of which stay in use: a \(1\.0 GB\), b \(1\.0 GB\)"):
        second.result(30)
    models[1].built[0].step()
    first.result(30)
    models[0].built[0].step()
    assert [answer.result(30).text for answer in running] == ["one", "one"]


def test_a_failed_load_gives_back_what_it_had_reserved(on: Build) -> None:
    """Each attempt would leave less for the next."""
    device, model = Device(memory="1GB"), Model("a")
    bridge = on(model, device)
    model.errors = [OSError("broken")]
    with pytest.raises(EngineStartError, match="broken"):
        bridge.start()
    assert device.status().reserved == 0
    on(Model("b"), device).infer("hello")


# --- deaths ---


def test_a_dead_engine_gives_back_what_it_held(on: Build) -> None:
    """It would be counted twice once it is rebuilt, and never fit."""
    device, model = Device(memory="1GB"), Model("a")
    bridge = on(model, device)
    bridge.infer("hello")
    model.built[0].crash(ValueError("device lost"))
    until(lambda: len(model.built) == 2)
    assert bridge.infer("and on", timeout=30).text == "and on"
    assert held(device) == {"a": GB}


def test_an_engine_that_dies_while_another_wants_its_memory(on: Build) -> None:
    """The one that waits and the one that is rebuilt would wait for each other."""
    device, model = Device(memory="1GB"), Model("a", manual=True)
    bridge, other = on(model, device), on(Model("b"), device)
    lost = bridge.submit("never stepped")
    until(lambda: model.built and model.built[0].active)
    answer = other.submit("hello")
    waits(other)
    model.built[0].crash(ValueError("device lost"))
    assert isinstance(lost.exception(30), EngineDeadError)
    assert answer.result(30).text == "hello"
    until(lambda: bridge.state in ("ready", "unloaded"))


def test_an_engine_that_stalls_is_no_burden(on: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of one that was replaced would be counted for as long as the process lives."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.02)
    device, model = Device(memory="1GB"), Model("a")
    bridge = on(model, device, stall_timeout=0.2)
    bridge.infer("hello")
    model.built[0].stall()
    lost = bridge.submit("hello")
    assert isinstance(lost.exception(30), EngineDeadError)
    assert bridge.infer("and on", timeout=30).text == "and on"
    assert held(device) == {"a": GB}


@pytest.mark.parametrize("station", ["loading", "serving", "waiting"])
def test_a_server_thread_that_is_stuck(on: Build, monkeypatch: pytest.MonkeyPatch, station: str) -> None:
    """Its successor would wait for the memory that the stuck one has reserved."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.5)
    device, model = Device(memory="1GB"), Model("a")
    bridge = on(model, device, stall_timeout=0.3)
    holder = Model("holder", manual=True)
    if station == "loading":
        model.gates = [threading.Event()]
        bridge.submit("hello")
        until(lambda: device.status().loading == "a")
    elif station == "waiting":
        on(holder, device).submit("one")
        until(lambda: holder.built and holder.built[0].active)
        bridge.submit("hello")
        waits(bridge)
    else:
        bridge.infer("hello")
    with Blocked(bridge):
        until(lambda: bridge._server_thread.keeper.run.left_behind or len(model.built) > 1)  # type: ignore[union-attr]
        answer = bridge.submit("and on")
        if station == "waiting":
            waits(bridge)
            holder.built[0].step()
        assert answer.result(30).text == "and on"
    until(lambda: held(device) == {"a": GB})


def test_a_killed_server_thread_holds_no_memory(on: Build) -> None:
    """What its engine had on the device would be lost to the others."""
    device = Device(memory="1GB")
    killed = on(Model("a"), device)
    killed.infer("hello")
    loop = killed._server_thread.handle.loop
    assert loop is not None
    loop.call_soon_threadsafe(loop.stop)
    assert on(Model("b"), device).infer("hello", timeout=30).text == "hello"


def test_the_idle_model_of_a_stuck_thread(on: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be asked to make room; whoever waits for it is served once it answers, or somebody else has left."""
    device = Device(memory="1GB")
    stuck, other = on(Model("a"), device), on(Model("b"), device)
    stuck.infer("hello")
    with Blocked(stuck):
        answer = other.submit("hello")
        assert waits(other).endswith("held by a (1.0 GB)")
    assert answer.result(30).text == "hello"


# --- many at once ---


def test_twenty_threads_and_room_for_one_model(on: Build) -> None:
    """Two models that push each other out would leave callers hanging, or answers lost."""
    device, models = Device(memory="1GB"), [Model("a"), Model("b")]
    bridges = [on(model, device) for model in models]

    def ask(number: int) -> int:
        for count in range(10):
            text = f"thread {number} question {count}"
            assert bridges[(number + count) % 2].infer(text, timeout=60).text == text
        return 10

    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(ask, range(20))) == 200
    assert time.monotonic() - began < 60
    status = device.status()
    assert status.loads == sum(len(model.built) for model in models)
    assert status.unloads == status.loads - 1
    assert status.reserved == GB


@pytest.mark.long
def test_many_models_in_any_order(on: Build) -> None:
    """All of it at once: every call ends, and the ledger holds what is loaded and no more."""
    device = Device(memory="3GB")
    models = [Model(f"m{number}", GB // (1 + number % 3)) for number in range(8)]
    bridges = [on(model, device, keep_alive=(None, 0.01)[number % 2]) for number, model in enumerate(models)]

    def ask(number: int) -> None:
        for count in range(60):
            model = (number * 7 + count * 3) % 8
            if count % 20 == 19 and number < 3 and models[model].built:
                models[model].built[-1].crash(ValueError("lost"))
            try:
                assert bridges[model].infer(f"{number} {count}", timeout=60).text == f"{number} {count}"
            except EngineDeadError:
                continue

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    until(lambda: device.status().reserved <= 3 * GB and device.status().loading is None)


# --- the device itself ---


def test_bridges_on_a_device_of_one_name_share_it(on: Build) -> None:
    """A user who builds no device would have models compute over each other's streams."""
    assert Device.of("cuda") is Device.of("cuda:0")
    assert Device.of("cpu") is not Device("cpu")
    bridge = on(Bridge(Model("by name"), device="cpu"))
    bridge.start()
    other = on(Bridge(ScriptedEngine, device="cpu"))
    other.start()
    for party in (on_device(bridge), on_device(other)):
        assert party.turns is Device.of("cpu").turns
    assert {"by name", "ScriptedEngine"} <= {party.label for party in Device.of("cpu").status().parties}


def test_a_function_that_calls_a_bridge_of_its_device(on: Build) -> None:
    """It would hold the device, and wait for a model that waits for the device."""
    device = Device()
    inner = on(Bridge(function_engine(lambda items: [2 * item for item in items]), device=device))
    outer = on(Bridge(function_engine(lambda items: [inner.call(item) + 1 for item in items]), device=device))
    assert outer.map([1, 2, 3], timeout=20) == [3, 5, 7]
    assert sorted(party.state for party in device.status().parties) == ["ready", "ready"]
    assert device.status().computing is None
    outer.close()
    assert len(device.status().parties) == 1


def test_an_engine_that_names_no_device_takes_no_turns(on: Build) -> None:
    """It may be a function that waits for the network, or for another bridge, and would hold up all the others."""
    bridge = on(Bridge(ScriptedEngine))
    bridge.start()
    with on_device(bridge).turn(), Party(Device.of("cpu").turns, Device.of("cpu").turns.lane(1.0)).turn():
        pass
    assert "ScriptedEngine" in {party.label for party in Device.of("cpu").status().parties}


def test_the_bundled_model_on_its_device(on: Build) -> None:
    """A real engine takes turns, and says how much memory it needs before and holds after."""
    device = Device(memory="20GB")
    bridge = on(Bridge("demo", device=device, weight=2))
    bridge.infer("hello", max_new_tokens=4)
    status = device.status()
    (party,) = status.parties
    assert (party.label, party.state, party.weight, party.pinned, party.share) == ("demo", "ready", 2.0, False, 1.0)
    assert party.seconds > 0
    assert status.reserved > 4 * 10**6
    bridge.close()
    assert device.status().reserved == 0


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"device": 5}, "device"),
        ({"device": ""}, "device"),
        ({"device": "gpu"}, "device"),
        ({"device": "CUDA"}, "device"),
        ({"device": "cuda:"}, "device"),
        ({"device": "cuda:-1"}, "device"),
        ({"keep_alive": -1}, "keep_alive"),
        ({"pin": "yes"}, "pin"),
        ({"weight": 0}, "weight"),
        ({"weight": 0.0009}, "weight"),
        ({"weight": 1001}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, object], param: str) -> None:
    """A mistake would show when the first call comes, or never."""
    with pytest.raises(InvalidRequestError) as raised:
        Bridge(ScriptedEngine, **wrong)  # type: ignore[arg-type]
    assert raised.value.param == param


@pytest.mark.parametrize(
    "name", ["cpu", "cpu:0", "cuda", "cuda:10", "mps", "xpu:1", "npu", "hpu", "meta", "privateuseone:0", "ascend"]
)
def test_devices_that_torch_may_know(name: str) -> None:
    """A user of a device that is not common would be told that there is no such thing."""
    kind, _, number = name.partition(":")
    assert Device(name).name == ("cpu" if kind == "cpu" else f"{kind}:{number or 0}")


@pytest.mark.parametrize("wrong", ["", "8 lumps", "0GB", "120%", 0, -1, 1.5, True])
def test_wrong_sizes_are_named(wrong: object) -> None:
    """The same for the memory of a device."""
    with pytest.raises(InvalidRequestError, match="memory must be"):
        Device(memory=wrong)  # type: ignore[arg-type]


def test_sizes() -> None:
    """What users write for a size is what they mean."""
    sizes: dict[int | str, int] = {
        "8GB": 8 * GB,
        "1.5 gb": 3 * GB // 2,
        "2GiB": 2 << 30,
        "512MB": 512 * 10**6,
        "7": 7,
        1000: 1000,
    }
    assert {size: Device(memory=size).status().memory for size in sizes} == sizes
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert Device(memory="50%").status().memory == pytest.approx(whole / 2, abs=1)
    assert Device().status().memory is None


@pytest.mark.parametrize("station", ["loaded", "loading"])
def test_a_fork_with_models_on_the_device(on: Build, station: str) -> None:
    """The child would find the memory taken by models that it has not, or wait for its parent's load."""
    device, gate = Device(memory="1GB"), threading.Event()
    model = Model("parents")
    if station == "loading":
        model.gates = [gate]
    parents = on(model, device)
    answer = parents.submit("hello")
    if station != "loading":
        answer.result(30)
    else:
        until(lambda: device.status().loading)
    childs = Model("childs").on(device)
    pid = os.fork()
    if not pid:
        failed = 1
        try:
            assert device.status().reserved == 0
            assert childs.infer("hello", timeout=30).text == "hello"
            childs.close()
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(pid, 0)[1] == 0
    gate.set()
    assert answer.result(30).text == "hello"
    assert held(device) == {"parents": GB}
