"""All channels of one bridge: lent to one consumer at a time, and known to the server while in use.

Rule: any thread.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.errors import LMBridgeError

IDLE = 64  # how many unused channels are kept for the next caller


class Channels:
    """Lends channels and knows those in use."""

    def __init__(self, wakes: WakeChain) -> None:
        self._wakes = wakes
        self._lock = threading.RLock()  # a signal handler may need it while its thread holds it
        # By id, weakly: a channel dropped by its consumer disappears with its last call. Not a WeakSet, which breaks
        # when one thread iterates while another drops. Added under _lock, like the next.
        self._known: dict[int, weakref.ref[Channel[Call]]] = {}
        self._closed: Callable[[], LMBridgeError] | None = None
        self._idle: deque[Channel[Call]] = deque()  # any thread; append and pop are atomic

    def lease(self) -> Channel[Call]:
        """A channel for one consumer.

        Raises:
            BridgeClosedError: the server has ended.
        """
        try:
            return self._idle.pop()
        except IndexError:
            channel: Channel[Call] = Channel(wakes=self._wakes)
            self.register(channel)
            return channel

    def register(self, channel: Channel[Call]) -> None:
        """Register a channel built by its consumer.

        Raises:
            BridgeClosedError: the server has ended.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            key = id(channel)
            self._known[key] = weakref.ref(channel, functools.partial(self._known.pop, key))

    def give_back(self, channel: Channel[Call]) -> None:
        """Return a channel whose calls have all ended. Takes no lock.

        A channel abandoned with a call in it is just dropped, and disappears with that call.
        """
        self._idle.append(channel)

    def trim(self) -> None:
        """Drop channels that have been idle."""
        while len(self._idle) > IDLE:
            self._idle.popleft()

    def held(self) -> list[Channel[Call]]:
        """The channels in use."""
        # Not items(): its tuples may trigger the garbage collector, whose finalizers remove entries.
        references = list(self._known.values())
        return [channel for reference in references if (channel := reference()) is not None]

    def close(self, error: Callable[[], LMBridgeError]) -> list[Call]:
        """Close every channel, refuse new ones with ``error()``, and return the calls not taken."""
        with self._lock:
            self._closed = error
        return [call for channel in self.held() for call in channel.close()]
