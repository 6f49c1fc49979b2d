"""Turns on a device: which of several engines computes next.

Rule: any thread but a server's, which must not wait for a turn. Nobody holds a device forever: waiters check the holder
several times a second, and proceed if it has gone, was closed, or takes too long.

This is weighted fair queueing. Each lane has a clock that runs while it computes, the slower the greater its weight;
the waiting lane whose clock is furthest behind is next. A lane returning from idleness has its clock set to that of the
others, so that nobody saves up time. An engine with one thread cannot wait while it computes, so two such engines
strictly alternate, whatever their weights: the device never idles to wait for one. How they divide the time depends on
the length of their turns, which ``share`` gives to engines that can choose it.
"""

from __future__ import annotations

import threading
import weakref
from time import monotonic
from types import TracebackType

from lmbridge.engines.standing import frame_of

LOOK = 0.25
"""Seconds between waiters' checks of the holder."""
LONGEST = 30.0
"""Seconds after which waiters consider a turn over, whatever its holder does."""
MOST_DEBT = 1.0
"""Seconds by which a clock may be ahead of the others: a long prompt is not repaid by a long wait."""
RECENT = 1.0
"""Seconds for which a lane counts as active after it last asked or computed."""
PART = 0.5
"""The share of another's usual turn to take beside it. A turn ends at the first pause beyond it, so that both together
take less than twice as long."""
SLICE = 0.05
"""Seconds of a turn when all lanes choose the length of theirs."""
SHORTEST = 0.0005
"""Seconds below which a turn is not worth its overhead."""
LATEST = 0.1
"""The weight of the last turn in the moving average of a lane's turns."""
OUTLIER = 4.0
"""A turn counts for at most this many usual ones: reading a prompt says little about later tokens."""


class Lane:
    """One bridge's time on a device; guarded by the lock of its ``Turns``.

    Attributes:
        weight: of two lanes that always want the device, the one of weight 2 gets it twice as long.
        used: seconds so far.
        usual: the moving average of its turns, in seconds; 0 before the first.
        sizes: whether its engine asks how long its turns may last.
    """

    __slots__ = ("weight", "used", "usual", "sizes", "due", "seen", "__weakref__")

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.used = self.usual = 0.0
        self.sizes = False
        self.due = 0.0  # its clock: where its next turn begins
        self.seen = float("-inf")  # when it last asked for a turn or ended one


class Party:
    """One engine's access to turns: ``Engine.party`` while the engine shares a device.

    Attributes:
        closed: its engine has ended or is about to: it no longer waits or delays others.
    """

    def __init__(self, turns: Turns, lane: Lane) -> None:
        self.lane = lane
        self.closed = False
        self.turns = turns

    def turn(self) -> Turn:
        """Block until it is this engine's turn; the turn lasts as long as the ``with`` block."""
        return Turn(self)

    def share(self) -> float | None:
        """The most seconds that a turn should last now; None while no other lane is active.

        In a turn with pauses, the time from one pause to the next.
        """
        return self.turns.share(self.lane)

    def pause(self) -> float:
        """In the middle of a turn, on its thread: let waiters go first; returns the seconds that took.

        For work that cannot be split, such as a batch of one text on a CPU: between two products of a layer, say. It
        costs next to nothing when nobody waits, and little until the turn has lasted for its ``share``.
        """
        return self.turns.pause(self)

    @property
    def contended(self) -> bool:
        """Whether another lane is active on the device."""
        return self.turns.contended(self.lane)

    @property
    def waiting(self) -> bool:
        """Whether a thread of this engine waits for its turn now. Takes no lock."""
        return any(turn.party is self for turn in self.turns.line())

    def close(self) -> None:
        """Give up its turn, held or awaited. Any thread; idempotent."""
        self.closed = True
        self.turns.dismiss(self)


class Turn:
    """One thread's turn on the device."""

    __slots__ = ("party", "thread", "start", "since", "bell")

    def __init__(self, party: Party) -> None:
        self.party = party
        self.thread = 0  # ident of the asking thread
        self.start = 0.0  # on the clock of its lane
        self.since = 0.0  # monotonic start time
        self.bell: threading.Lock | None = None  # held while it waits

    def __enter__(self) -> Turn:
        self.thread = threading.get_ident()
        try:
            self.party.turns.take(self)
        except BaseException:  # thrown into this thread, which may already have the turn
            self.party.turns.end(self)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.party.turns.end(self)


class Turns:
    """Hands one device from one thread to the next.

    Args:
        apart: False makes nobody wait.
    """

    def __init__(self, apart: bool = True) -> None:
        self._apart = apart
        self._lock = threading.Lock()
        # Guarded by _lock. If an exception strikes between two steps, the next look repairs it.
        self._holder: Turn | None = None
        self._line: list[Turn] = []  # waiting turns; few, so scanning is cheap
        self._clock = 0.0  # where the last turn began on its lane's clock
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()

    def lane(self, weight: float) -> Lane:
        """A new lane."""
        lane = Lane(weight)
        with self._lock:
            self._lanes.add(lane)
        return lane

    def used(self, lane: Lane) -> float:
        """Seconds for which a lane has held the device, including its current turn."""
        with self._lock:
            holder = self._holder
            now = monotonic() - holder.since if holder is not None and holder.party.lane is lane else 0.0
            return lane.used + now

    def has(self, lane: Lane) -> bool:
        """Whether this lane holds the device. Takes no lock."""
        holder = self._holder
        return holder is not None and holder.party.lane is lane

    def line(self) -> list[Turn]:
        """The waiting turns."""
        return self._line[:]

    # --- a turn ---

    def take(self, turn: Turn) -> None:
        """Return when this turn begins, or its engine is closed."""
        with self._lock:
            holder, lane = self._holder, turn.party.lane
            if holder is not None and holder.thread == turn.thread:  # interrupted at the end of its last turn
                self._release(holder)
            if turn.party.closed:
                return
            turn.since = lane.seen = monotonic()
            if not self._apart:
                return
            clock, due = self._clock, lane.due
            turn.start = clock if due < clock else due if due < clock + MOST_DEBT else clock + MOST_DEBT
            if self._holder is None and not self._line:
                self._clock = turn.start
                self._holder = turn
                return
            turn.bell = threading.Lock()
            turn.bell.acquire()
            self._line.append(turn)
        self._wait(turn, turn.bell)

    def end(self, turn: Turn) -> None:
        """The turn is over or cancelled; idempotent."""
        with self._lock:
            if not self._apart and turn.since:
                turn.party.lane.used += monotonic() - turn.since
                turn.since = 0.0
            elif self._holder is turn:
                self._release(turn)
            elif turn in self._line:
                self._line.remove(turn)

    def pause(self, party: Party) -> float:
        """If the party's turn has lasted long enough, let waiters go first and take another; returns seconds waited."""
        turn = self._holder
        if not self._line or turn is None or turn.party is not party or turn.thread != threading.get_ident():
            return 0.0
        began = monotonic()
        if began - turn.since < (self.share(party.lane) or 0.0):
            return 0.0
        self.end(turn)
        self.take(turn)
        return monotonic() - began

    def dismiss(self, party: Party) -> None:
        """Make a closed party stop waiting and delaying others."""
        with self._lock:
            leaving = [turn for turn in self._line if turn.party is party]
            self._line = [turn for turn in self._line if turn.party is not party]
            if self._holder is not None and self._holder.party is party:
                self._release(self._holder)
        for turn in leaving:
            _ring(turn)

    def contended(self, lane: Lane) -> bool:
        """Whether another lane is active."""
        with self._lock:
            return self._apart and bool(self._at_work(lane))

    def share(self, lane: Lane) -> float | None:
        """How many seconds a turn of this lane should last now; None while no other is active."""
        with self._lock:
            lane.sizes = True
            others = self._at_work(lane) if self._apart else []
        if not others:
            return None
        fixed = [other for other in others if not other.sizes]
        if fixed:  # these cannot shorten their turns: those that can share what is left
            longest = PART * min(other.usual / other.weight for other in fixed) * lane.weight
            return min(LONGEST, max(SHORTEST, longest / (1 + len(others) - len(fixed))))
        mean = (lane.weight + sum(other.weight for other in others)) / (1 + len(others))
        return max(SHORTEST, SLICE * lane.weight / mean)

    # --- waiting ---

    def _wait(self, turn: Turn, bell: threading.Lock) -> None:
        while True:
            bell.acquire(timeout=LOOK)
            with self._lock:
                if self._holder is turn or turn not in self._line:
                    return
                self._look()

    # --- with the lock held ---

    def _at_work(self, lane: Lane) -> list[Lane]:
        """The other lanes that have computed or asked recently."""
        inside = {turn.party.lane for turn in [*self._line, *([self._holder] if self._holder else [])]}
        recently = monotonic() - RECENT
        return [other for other in self._lanes if other is not lane and (other.seen > recently or other in inside)]

    def _release(self, turn: Turn) -> None:
        """The holder's turn is over: the next one's begins."""
        now, lane = monotonic(), turn.party.lane
        lasted, usual = now - turn.since, lane.usual
        lane.seen = now
        lane.used += lasted
        lane.due = turn.start + lasted / lane.weight
        if not usual:
            lane.usual = lasted
        elif lasted < OUTLIER * usual:
            lane.usual = usual + LATEST * (lasted - usual)
        else:
            lane.usual = usual + LATEST * (OUTLIER - 1) * usual
        self._holder = None
        if self._line:
            self._begin_next()

    def _begin_next(self) -> None:
        for turn in self._line:  # another thread of this engine may have computed meanwhile
            turn.start = max(turn.start, min(turn.party.lane.due, self._clock + MOST_DEBT))
        turn = min(self._line, key=lambda turn: turn.start)
        turn.since = monotonic()
        self._clock = max(self._clock, turn.start)
        self._holder = turn
        self._line.remove(turn)
        _ring(turn)

    def _look(self) -> None:
        """Release the device if its holder has gone or takes too long."""
        holder = self._holder
        if holder is None:  # the hand-over was interrupted
            self._begin_next()
        elif holder.party.closed or monotonic() - holder.since > LONGEST or frame_of(holder.thread) is None:
            self._release(holder)


def _ring(turn: Turn) -> None:
    """Wake the thread waiting for this turn."""
    if turn.bell is not None and turn.bell.locked():
        turn.bell.release()
