"""Turns on a device: who computes next, where several engines share one.

Rule: any thread but a server's, which must not wait for a turn. Nobody holds a device for good: whoever waits looks,
several times a second, at who has it, and goes on where that one has gone, was closed, or takes too long.

It is weighted fair queueing. Each lane has a clock that runs while it computes, the slower the more it weighs; of those
that wait, the lane whose clock is furthest behind is next. One that had nothing to do has its clock set to that of the
others when it comes back, so that nobody saves up. An engine with one thread cannot wait while it computes, so two such
engines take turns strictly, whatever they weigh: the device is not kept idle for one to come back. How they divide the
time is a matter of how long their turns are, which ``share`` tells those that can choose.
"""

from __future__ import annotations

import threading
import weakref
from time import monotonic
from types import TracebackType

from lmbridge.engines.standing import frame_of

LOOK = 0.25
"""Seconds between two looks of those who wait at whoever has the device."""
LONGEST = 30.0
"""Seconds after which a turn is over for those who wait, whatever its holder does."""
MOST_DEBT = 1.0
"""Seconds by which a clock may be ahead of the others': a long prompt is not paid back by a long silence."""
RECENT = 1.0
"""Seconds for which a lane counts as at work after it has last asked or computed."""
PART = 0.5
"""The share of another's usual turn that is taken beside it. A turn ends with the first pause that is over it, so that
what both take together stays below twice as long.
"""
SLICE = 0.05
"""Seconds of a turn among lanes that all choose for how long they take: there is none to go by."""
SHORTEST = 0.0005
"""Seconds below which a turn is not worth its overhead."""
LATEST = 0.1
"""The weight of the last turn in the moving average of a lane's turns."""
OUTLIER = 4.0
"""A turn counts for so many usual ones at most: a prompt that is read says little of the tokens that follow."""


class Lane:
    """One bridge's time on a device; guarded by the lock of its ``Turns``.

    Attributes:
        weight: of two lanes that always want the device, the one of weight 2 gets it twice as long.
        used: seconds so far.
        usual: seconds of a turn, a moving average; 0 before the first.
        sizes: whether its engine asks for how long its turns may last.
    """

    __slots__ = ("weight", "used", "usual", "sizes", "due", "seen", "__weakref__")

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.used = self.usual = 0.0
        self.sizes = False
        self.due = 0.0  # its clock: where its next turn begins
        self.seen = float("-inf")  # when it last asked for a turn or ended one


class Party:
    """One engine's right to turns; what ``Engine.party`` is while the engine shares a device.

    Attributes:
        closed: its engine has ended or is about to: it waits for nothing any more, and holds nobody up.
    """

    def __init__(self, turns: Turns, lane: Lane) -> None:
        self.lane = lane
        self.closed = False
        self.turns = turns

    def turn(self) -> Turn:
        """Blocks until it is this engine's turn; the turn lasts as long as the ``with``."""
        return Turn(self)

    def share(self) -> float | None:
        """For how many seconds a turn should last now, at most; None while nobody else is at work on the device.

        Of a turn with pauses in it, this is the time from one to the next.
        """
        return self.turns.share(self.lane)

    def pause(self) -> float:
        """In the midst of a turn, on its thread: let those who wait have theirs first; how many seconds that took.

        For what cannot be made shorter, as a batch of one text on a CPU: between two products of a layer, say. It costs
        next to nothing when nobody waits, and little while the turn has not lasted for its ``share``.
        """
        return self.turns.pause(self)

    @property
    def contended(self) -> bool:
        """Whether somebody else is at work on the device."""
        return self.turns.contended(self.lane)

    @property
    def waiting(self) -> bool:
        """Whether a thread of this engine waits for its turn now. Takes no lock."""
        return any(turn.party is self for turn in self.turns.line())

    def close(self) -> None:
        """Give up the turn that it has or waits for. Any thread, more than once."""
        self.closed = True
        self.turns.dismiss(self)


class Turn:
    """One stay on the device, of one thread."""

    __slots__ = ("party", "thread", "start", "since", "bell")

    def __init__(self, party: Party) -> None:
        self.party = party
        self.thread = 0  # ident of whoever asked
        self.start = 0.0  # on the clock of its lane
        self.since = 0.0  # monotonic time of its beginning
        self.bell: threading.Lock | None = None  # held while it waits

    def __enter__(self) -> Turn:
        self.thread = threading.get_ident()
        try:
            self.party.turns.take(self)
        except BaseException:  # thrown into this thread, which may have got the turn meanwhile
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
        apart: False has nobody wait for anybody.
    """

    def __init__(self, apart: bool = True) -> None:
        self._apart = apart
        self._lock = threading.Lock()
        # Guarded by _lock. Should an exception strike between two steps in here, the next who looks sets it right.
        self._holder: Turn | None = None
        self._line: list[Turn] = []  # those who wait; few, so that looking through it is cheap
        self._clock = 0.0  # where the last turn began on its lane's clock
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()

    def lane(self, weight: float) -> Lane:
        """A new lane."""
        lane = Lane(weight)
        with self._lock:
            self._lanes.add(lane)
        return lane

    def used(self, lane: Lane) -> float:
        """Seconds for which a lane has had the device, those of the present turn too."""
        with self._lock:
            holder = self._holder
            now = monotonic() - holder.since if holder is not None and holder.party.lane is lane else 0.0
            return lane.used + now

    def has(self, lane: Lane) -> bool:
        """Whether it is this lane's turn. Takes no lock."""
        holder = self._holder
        return holder is not None and holder.party.lane is lane

    def line(self) -> list[Turn]:
        """Those who wait."""
        return self._line[:]

    # --- a turn ---

    def take(self, turn: Turn) -> None:
        """Return when it is this one's turn, or when its engine has been closed."""
        with self._lock:
            holder, lane = self._holder, turn.party.lane
            if holder is not None and holder.thread == turn.thread:  # it was struck at the end of its last turn
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
        """It is over, or will not come; more than once does no harm."""
        with self._lock:
            if not self._apart and turn.since:
                turn.party.lane.used += monotonic() - turn.since
                turn.since = 0.0
            elif self._holder is turn:
                self._release(turn)
            elif turn in self._line:
                self._line.remove(turn)

    def pause(self, party: Party) -> float:
        """Hand the party's turn on to those who wait, if it has lasted long enough, and take another; seconds until it
        came.
        """
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
        """Have a closed party hold nobody up, and wait no more."""
        with self._lock:
            leaving = [turn for turn in self._line if turn.party is party]
            self._line = [turn for turn in self._line if turn.party is not party]
            if self._holder is not None and self._holder.party is party:
                self._release(self._holder)
        for turn in leaving:
            _ring(turn)

    def contended(self, lane: Lane) -> bool:
        """Whether another lane is at work."""
        with self._lock:
            return self._apart and bool(self._at_work(lane))

    def share(self, lane: Lane) -> float | None:
        """For how many seconds a turn of this lane should last now; None while no other is at work."""
        with self._lock:
            lane.sizes = True
            others = self._at_work(lane) if self._apart else []
        if not others:
            return None
        fixed = [other for other in others if not other.sizes]
        if fixed:  # they cannot shorten their turns: whoever can makes room for them, together with the others who can
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
        """The other lanes that have computed or asked a moment ago."""
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
        for turn in self._line:  # another thread of the same engine may have computed while this one waited
            turn.start = max(turn.start, min(turn.party.lane.due, self._clock + MOST_DEBT))
        turn = min(self._line, key=lambda turn: turn.start)
        turn.since = monotonic()
        self._clock = max(self._clock, turn.start)
        self._holder = turn
        self._line.remove(turn)
        _ring(turn)

    def _look(self) -> None:
        """See whether whoever has the device holds the others up for good."""
        holder = self._holder
        if holder is None:  # whoever handed it on was struck on the way
            self._begin_next()
        elif holder.party.closed or monotonic() - holder.since > LONGEST or frame_of(holder.thread) is None:
            self._release(holder)


def _ring(turn: Turn) -> None:
    """Wake whoever waits for this turn."""
    if turn.bell is not None and turn.bell.locked():
        turn.bell.release()
