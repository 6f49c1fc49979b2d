"""Who computes next on a device that several engines share, and what holds the others up: nothing, for long."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest

import lmbridge.device.turns
from lmbridge import Device, InvalidRequestError
from lmbridge.device.turns import Party, Turns
from tests.conftest import until


class Clock:
    """The time of a device, which moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """A thread that asks for one turn after another and computes for as long as the clock is moved meanwhile."""

    def __init__(self, party: Party, log: list[str], name: str) -> None:
        self.party = party
        self._log, self._name = log, name
        self._ended = False
        self.inside = False
        self._go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def end_turn(self) -> None:
        """Let it end the turn that it has, and ask for the next."""
        self._go.release()

    def end(self) -> None:
        self._ended = True
        self._go.release()

    def _run(self) -> None:
        while not self._ended:
            with self.party.turn():
                self.inside = True
                self._log.append(self._name)
                self._go.acquire()
                self.inside = False


class Strike(BaseException):
    """Thrown into a thread."""


def strike(thread: threading.Thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Strike))


def in_turn(party: Party, then: Callable[[], object] = lambda: None) -> threading.Thread:
    """A thread that takes one turn."""

    def run() -> None:
        try:
            with party.turn():
                then()
        except Strike:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait look at whoever has the device a hundred times a second."""
    monkeypatch.setattr(lmbridge.device.turns, "LOOK", 0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lmbridge.device.turns, "monotonic", clock)
    return clock


@pytest.fixture
def ended() -> Iterator[list[Worker]]:
    """Workers that end with the test."""
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.party.close()
        worker.end()
    for worker in workers:
        worker.thread.join(10)
        assert not worker.thread.is_alive()


def party(turns: Turns, weight: float = 1.0) -> Party:
    return Party(turns, turns.lane(weight))


def crowd(turns: Turns, ended: list[Worker], weights: dict[str, float]) -> tuple[list[str], dict[str, Worker]]:
    """Workers by name, of which the first has the device and the others wait."""
    log: list[str] = []
    workers = {}
    for name, weight in weights.items():
        workers[name] = Worker(party(turns, weight), log, name)
        ended.append(workers[name])
        until(lambda: log and len(turns.line()) == len(workers) - 1)
    return log, workers


def serve(turns: Turns, log: list[str], workers: dict[str, Worker], clock: Clock, seconds: dict[str, float]) -> None:
    """One turn passes; its holder stands in line again then."""
    holder, count = log[-1], len(log)
    clock.now += seconds[holder]
    workers[holder].end_turn()
    until(lambda: len(log) > count and len(turns.line()) == len(workers) - 1)


def test_a_turn_with_pauses_lasts_for_its_share(turns: Turns, clock: Clock) -> None:
    """Handed on at every pause, however short the time since the last, it would come to next to nothing."""
    stream, job = party(turns), party(turns)
    waits: list[float] = []
    with job.turn():
        other = in_turn(stream, lambda: clock.__setattr__("now", clock.now + 0.002))
        until(lambda: turns.line())
        share = job.turns.share(job.lane)
        assert share is not None
        clock.now += 0.9 * share
        waits.append(job.pause())
        clock.now += 0.2 * share
        waits.append(job.pause())
    other.join(10)
    assert waits == [0.0, pytest.approx(0.002)]


def test_a_device_without_turns_has_all_compute_at_once() -> None:
    """On a CPU that has cores for each. What each has used is counted all the same."""
    device = Device(turns=False)
    lanes = [party(device.turns) for _ in range(2)]
    both = threading.Barrier(2)
    threads = [in_turn(lane, lambda: both.wait(10) and None) for lane in lanes]
    for thread in threads:
        thread.join(10)
    assert not both.broken
    assert all(device.turns.used(lane.lane) > 0 for lane in lanes)
    assert [lane.share() for lane in lanes] == [None, None]
    assert not lanes[0].contended


def test_whether_a_device_takes_turns_is_a_flag() -> None:
    """Not a number of them."""
    with pytest.raises(InvalidRequestError, match="turns must be True or False, not 2"):
        Device(turns=2)  # type: ignore[arg-type]


def test_two_engines_take_turns(turns: Turns, clock: Clock, ended: list[Worker]) -> None:
    """A stream beside a large job would wait for all of that, or the job for the end of the stream."""
    log, workers = crowd(turns, ended, {"stream": 1, "job": 1})
    for _ in range(8):
        serve(turns, log, workers, clock, {"stream": 0.002, "job": 0.1})
    assert log == ["stream", "job"] * 4 + ["stream"]


def test_two_whose_turns_are_of_one_size(turns: Turns, clock: Clock, ended: list[Worker]) -> None:
    """The device would stand idle until the one that weighs more comes back for another turn."""
    log, workers = crowd(turns, ended, {"heavy": 2, "light": 1})
    for _ in range(8):
        serve(turns, log, workers, clock, {"heavy": 0.01, "light": 0.01})
    assert log == ["heavy", "light"] * 4 + ["heavy"]


def test_time_is_shared_by_weight(turns: Turns, clock: Clock, ended: list[Worker]) -> None:
    """An engine that weighs twice as much gets the device twice as long as each of two others."""
    log, workers = crowd(turns, ended, {"heavy": 2, "one": 1, "two": 1})
    spare = Worker(workers["heavy"].party, log, "heavy")  # with one thread it could not wait while it computes
    ended.append(spare)
    until(lambda: len(turns.line()) == 3)
    for _ in range(80):
        count = len(log)
        clock.now += 0.01
        holder = next(worker for worker in ended if worker.inside)
        holder.end_turn()
        until(functools.partial(lambda before: len(log) > before and len(turns.line()) == 3, count))
    used = {name: worker.party.lane.used for name, worker in workers.items()}
    assert used["heavy"] == pytest.approx(used["one"] + used["two"], abs=0.05)
    assert used["one"] == pytest.approx(used["two"], abs=0.03)


def test_long_turns_are_paid_back(turns: Turns, clock: Clock, ended: list[Worker]) -> None:
    """Of three engines, the one whose turns are long would get more of the device than those whose turns are short."""
    log, workers = crowd(turns, ended, {"long": 1, "one": 1, "two": 1})
    for _ in range(60):
        serve(turns, log, workers, clock, {"long": 0.1, "one": 0.01, "two": 0.01})
    used = [worker.party.lane.used for worker in workers.values()]
    assert max(used) - min(used) < 0.15


def test_nobody_saves_up(turns: Turns, clock: Clock, ended: list[Worker]) -> None:
    """An engine that had nothing to do for an hour must not have the device for the next half of one."""
    log, workers = crowd(turns, ended, {"busy": 1, "also busy": 1})
    for _ in range(40):
        serve(turns, log, workers, clock, {"busy": 0.1, "also busy": 0.1})
    workers["late"] = Worker(party(turns), log, "late")
    ended.append(workers["late"])
    until(lambda: len(turns.line()) == 2)
    del log[:-1]
    for _ in range(9):
        serve(turns, log, workers, clock, dict.fromkeys(workers, 0.1))
    assert 3 <= log.count("late") <= 4


def test_a_pause_lets_others_go_first(turns: Turns, clock: Clock) -> None:
    """Beside a batch that cannot be cut, a stream would wait for all of it at each of its tokens."""
    job, stream, log = party(turns), party(turns), list[str]()

    def work() -> None:
        for part in range(3):
            if part:
                job.pause()
            log.append("job")
            until(turns.line)
            clock.now += 0.01

    batch = in_turn(job, work)
    until(lambda: log)
    for _ in range(3):
        in_turn(stream, lambda: log.append("stream")).join(10)
    batch.join(10)
    assert log == ["job", "stream"] * 3
    assert job.lane.used == pytest.approx(0.03)
    assert job.lane.usual == pytest.approx(0.01)  # which is what others wait for


def test_a_pause_that_nobody_needs(turns: Turns) -> None:
    """Outside a turn, on another's thread or with nobody waiting it must not give away or take anything."""
    one, other = party(turns), party(turns)
    one.pause()
    with one.turn() as turn:
        one.pause()
        other.pause()
        waiting = in_turn(other)
        until(turns.line)
        pausing = threading.Thread(target=one.pause)  # which has no turn
        pausing.start()
        pausing.join(10)
        assert turns._holder is turn
    waiting.join(10)


def test_whoever_is_struck_in_a_pause(turns: Turns, quick: None) -> None:
    """Its batch fails; the turn that it waits for again would be nobody's."""
    job, hangs = party(turns), threading.Event()

    def work() -> None:
        until(turns.line)
        job.pause()

    batch = in_turn(job, work)
    until(lambda: turns._holder)
    other = in_turn(party(turns), lambda: hangs.wait(10))
    until(lambda: [turn.party for turn in turns.line()] == [job])
    strike(batch)
    batch.join(10)
    assert not turns.line()
    hangs.set()
    other.join(10)
    in_turn(party(turns)).join(10)


def test_a_failing_turn_is_over(turns: Turns) -> None:
    """A batch that raises would leave the device to nobody."""
    one = party(turns)
    with pytest.raises(ValueError, match="poison"), one.turn():
        raise ValueError("poison")
    in_turn(party(turns)).join(10)
    assert one.lane.used > 0


def test_whoever_is_struck_while_it_waits(turns: Turns, quick: None) -> None:
    """An exception thrown into a thread that waits must not leave its place in the line, which nobody would take."""
    with party(turns).turn():
        struck = in_turn(party(turns))
        until(lambda: len(turns.line()) == 1)
        strike(struck)
        struck.join(10)
        assert not turns.line()
    in_turn(party(turns)).join(10)


def test_a_thread_that_ends_in_its_turn(turns: Turns, quick: None) -> None:
    """Whoever waits for a thread that is not there any more would wait for ever."""
    lost = threading.Thread(target=party(turns).turn().__enter__)
    lost.start()
    lost.join(10)
    waiting = in_turn(party(turns))
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_engine_that_is_closed_in_its_turn(turns: Turns, quick: None) -> None:
    """A step that hangs would hold the other models' requests, though its engine was replaced long ago."""
    hangs, stuck = threading.Event(), party(turns)
    holder = in_turn(stuck, hangs.wait)
    waiting = in_turn(party(turns))
    until(lambda: len(turns.line()) == 1)
    stuck.close()
    waiting.join(10)
    assert not waiting.is_alive()
    hangs.set()
    holder.join(10)
    with party(turns).turn():  # what woke up late has ended nobody else's turn
        assert turns.contended(stuck.lane)


def test_a_closed_engine_waits_for_nothing(turns: Turns) -> None:
    """Closing an engine would take as long as another's turn."""
    closed = party(turns)
    with party(turns).turn():
        waiting = in_turn(closed)
        until(lambda: len(turns.line()) == 1)
        closed.close()
        waiting.join(10)
        assert not waiting.is_alive()
        in_turn(closed).join(10)


def test_a_turn_that_takes_too_long(turns: Turns, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A kernel that never returns stalls its own engine, and no other."""
    monkeypatch.setattr(lmbridge.device.turns, "LONGEST", 0.05)
    hangs, stuck = threading.Event(), party(turns)
    holder = in_turn(stuck, hangs.wait)
    for _ in range(3):
        in_turn(party(turns)).join(10)
    hangs.set()
    holder.join(10)
    assert stuck.lane.due <= turns._clock + lmbridge.device.turns.LONGEST + 10


def test_a_thread_that_was_struck_as_its_turn_ended(turns: Turns) -> None:
    """It goes on without having given the device back; asking again would have it wait for itself."""
    one = party(turns)
    one.turn().__enter__()
    with one.turn():
        pass
    in_turn(party(turns)).join(10)


class Struck:
    """Threads that take turns, whatever is thrown into them; how many each has had, and how often it was struck."""

    def __init__(self, turns: Turns, count: int) -> None:
        self.had, self.caught = [0] * count, [0] * count
        self._turns = turns
        self._ended = False
        self._threads = [threading.Thread(target=self._live, args=(n,), daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def strike(self, number: int) -> None:
        """Throw something into one that takes turns; returns when it takes them again."""
        had, caught = self.had[number], self.caught[number]
        until(lambda: self.had[number] > had)
        strike(self._threads[number])
        until(lambda: self.caught[number] > caught)

    def end(self) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _live(self, number: int) -> None:
        mine = party(self._turns)
        while not self._ended:
            try:
                while not self._ended:
                    with mine.turn():
                        self.had[number] += 1
            except Strike:
                self.caught[number] += 1


def test_threads_struck_at_any_moment(turns: Turns, quick: None) -> None:
    """Whatever is thrown into whomever, the others get their turns, and nobody is left in the line."""
    rng, struck = random.Random(5), Struck(turns, 4)
    for _ in range(200):
        struck.strike(rng.choice([0, 1]))
    for number, had in enumerate(struck.had[:]):
        until(functools.partial(lambda number, had: struck.had[number] > had, number, had))
    struck.end()
    in_turn(party(turns)).join(10)
    assert not turns.line()


def test_nobody_else_is_at_work(turns: Turns, clock: Clock) -> None:
    """An encoder alone on its device must not cut its batches."""
    mine, other = party(turns), party(turns)
    assert mine.share() is None
    with other.turn():
        clock.now += 5.0
        assert mine.share() is not None  # however long it has been at it
    clock.now += 1.5
    assert mine.share() is None


def test_how_long_a_turn_may_be(turns: Turns, clock: Clock) -> None:
    """A stream's pace is kept when what computes in between takes less than one of its own steps."""
    stream, job = party(turns), party(turns, 2.0)
    assert job.share() is None
    for _ in range(50):
        with stream.turn():
            clock.now += 0.01
    assert job.share() == pytest.approx(0.5 * 0.01 * 2.0)
    another = party(turns)
    assert another.share() == pytest.approx(0.5 * 0.01)
    with another.turn():
        pass
    assert job.share() == pytest.approx(0.5 * 0.01 * 2.0 / 2)  # between them they do not double the stream's pause


def test_one_long_prompt_does_not_lengthen_the_slices(turns: Turns, clock: Clock) -> None:
    """After it the stream's tokens come as fast as before, and would be held up for much longer than one takes."""
    stream, job = party(turns), party(turns)
    for seconds in [0.01] * 50 + [5.0]:
        with stream.turn():
            clock.now += seconds
    share = job.share()
    assert share is not None
    assert share < 0.5 * 0.014


def test_turns_too_short_to_be_worth_it(turns: Turns, clock: Clock) -> None:
    """Beside a tiny model, batches of one text each would take the encoder its whole speed."""
    stream, job = party(turns), party(turns)
    for _ in range(5):
        with stream.turn():
            clock.now += 0.0001
    assert job.share() == lmbridge.device.turns.SHORTEST


def test_a_share_is_never_longer_than_a_turn_may_be(turns: Turns, clock: Clock) -> None:
    """Beside a model of hardly any weight an engine could not reckon with what it is told, and end."""
    heavy, light = party(turns, 1000.0), party(turns, 0.001)
    with light.turn():
        clock.now += 20.0
    assert heavy.share() == lmbridge.device.turns.LONGEST


def test_encoders_beside_each_other(turns: Turns, clock: Clock) -> None:
    """Each cutting its batches by the other's would leave both with the shortest there are."""
    one, two = party(turns, 3.0), party(turns, 1.0)
    for _ in range(20):
        for mine in (one, two):
            slice_ = mine.share() or 0.1
            with mine.turn():
                clock.now += slice_
    first, second = one.share(), two.share()
    assert first == pytest.approx(0.075)
    assert second == pytest.approx(0.025)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_device_after_a_fork() -> None:
    """The child would wait for turns of threads that exist in its parent only."""
    from lmbridge.device import Device

    device = Device("cpu")
    release = threading.Event()
    parents = Party(device.turns, device.turns.lane(1.0))
    holder = in_turn(parents, release.wait)
    until(lambda: parents.turns._holder)
    with device.turns._lock:
        pid = os.fork()
    if not pid:
        signal_end = 1
        try:
            with Party(device.turns, device.turns.lane(1.0)).turn():
                signal_end = 0
        finally:
            os._exit(signal_end)
    assert os.waitpid(pid, 0)[1] == 0
    release.set()
    holder.join(10)
