"""Several answers read by one thread while they grow.

Rule: the caller's end. A group is one consumer with one channel; its tokens say which of its calls has news.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lmbridge.crossing.call import Call, timeout_error
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.errors import LMBridgeError, fresh
from lmbridge.messages import Delta, Request, Response, join_deltas

if TYPE_CHECKING:
    from lmbridge.server.server import Server


class StreamGroup:
    """The deltas of several answers, as they come: ``for index, delta in bridge.stream_many(prompts)``.

    The last delta of each answer has a ``finish_reason`` or an ``error``; an answer that fails leaves the others
    running. Leaving the loop, ``close``, the end of a ``with`` and dropping the group abort what still runs. Deltas
    that come while nobody reads are merged into the answer's next one.
    """

    def __init__(
        self,
        server: Server,
        channel: Channel,
        client: object,
        requests: Sequence[Request],
        owner: object,
        release: Callable[[Channel], None],
    ) -> None:
        self._server = server
        self._channel = channel
        self._owner = owner  # keeps the bridge alive for as long as the group is
        self._release: Callable[[Channel], None] | None = release  # takes the channel back, once
        self._calls = [Call(request, channel, client, streaming=True) for request in requests]
        self._read: list[list[Delta]] = [[] for _ in requests]
        self._open = {call: index for index, call in enumerate(self._calls)}  # reader only, as is the next
        self._news: deque[tuple[int, Delta]] = deque()
        self._iterated = False
        self._turn = threading.Lock()  # held by the thread that reads
        try:
            for call in self._calls:
                if not server.gate.enter(call):
                    raise timeout_error(call)
                server.submit(call)
        except BaseException:
            self._leave()
            raise

    @property
    def request_ids(self) -> list[str]:
        return [call.request.id for call in self._calls]

    @property
    def responses(self) -> list[Response | BaseException]:
        """The ends of the answers, in the order of the prompts; each is a whole Response or an error.

        Raises:
            RuntimeError: the group has not ended yet.
        """
        if self._open and not all(call.outcomes for call in self._calls):
            raise RuntimeError("The answers have not ended yet; read them to their ends, or close the group, before.")
        return [_result(call, read) for call, read in zip(self._calls, self._read, strict=True)]

    def __iter__(self) -> Iterator[tuple[int, Delta]]:
        if self._iterated:
            raise RuntimeError("A group of streams can be iterated once; its whole answers are in .responses.")
        self._iterated = True
        return self._iterate()

    def _iterate(self) -> Iterator[tuple[int, Delta]]:
        # A generator of its own, so that `break` drops it and this finally runs at once.
        try:
            while self.wait():
                try:
                    yield next(self)
                except StopIteration:
                    return
        finally:
            self._leave()

    def __next__(self) -> tuple[int, Delta]:
        """The next delta of any answer, with the index of its prompt; raises StopIteration at the end of all."""
        self.wait()
        if not self._news:
            raise StopIteration
        return self._news.popleft()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until ``next`` would not; False when ``timeout`` seconds passed first.

        Raises:
            RuntimeError: another thread reads already.
            ForkedError: this is a child of the process that the group belongs to.
        """
        self._server.check_process()
        if not self._turn.acquire(False):
            raise RuntimeError("Another thread is reading this group; give each thread one of its own.")
        limit = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._news and self._open:
                if not self._look(limit):
                    return False
            return True
        except BaseException:  # KeyboardInterrupt while waiting: nobody reads on
            self._leave()
            raise
        finally:
            self._give_back()
            self._turn.release()

    def close(self, error: LMBridgeError | None = None) -> None:
        """Abort what still runs; a reader in another thread sees the end. Any thread, any time.

        Args:
            error: what that reader is told of each answer instead, and what they count as having ended with.
        """
        for call in self._leave(error):
            call.channel.nudge(call)

    def __enter__(self) -> StreamGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_turn"):
            self._leave()

    # --- reading ---

    def _look(self, limit: float | None) -> bool:
        """Wait for one token and take what its call has; False when ``limit`` has passed."""
        now = time.monotonic()
        deadline = next(iter(self._open)).request.deadline  # a group shares one
        if deadline is not None and now >= deadline:
            self._end_all(timeout_error)
            return True
        if limit is not None and now >= limit:
            return False
        ends = [end for end in (limit, deadline) if end is not None]
        try:
            self._take(self._channel.wait(True, min(ends) - now if ends else None))
        except Empty:
            pass
        except Closed:
            self._end_all(lambda call: self._server.closed_error())
        return True

    def _take(self, call: Call) -> None:
        """Put what a call has into the news; its end too, once everything was read."""
        index = self._open.get(call)
        if index is None:  # a late token
            return
        call.signalled = False  # before looking, so that what comes now sends a new token
        outcome = call.outcome  # before the deltas, all of which precede it
        taken = call.deltas[:]
        del call.deltas[: len(taken)]
        if taken:
            delta = join_deltas(taken)
            self._read[index].append(delta)
            self._news.append((index, delta))
        if outcome is None:
            return
        del self._open[call]
        if isinstance(outcome, Response):
            if not taken or taken[-1].finish_reason is None:
                self._news.append((index, Delta(finish_reason=outcome.finish_reason, usage=outcome.usage)))
        elif not taken or taken[-1].error is None:
            self._news.append((index, Delta(error=_as_error(call.error(outcome, self._read[index])))))

    def _end_all(self, error: Callable[[Call], LMBridgeError]) -> None:
        for call in list(self._open):
            if call.settle(error(call)):
                self._server.abort(call)
            self._take(call)

    def _leave(self, error: LMBridgeError | None = None) -> list[Call]:
        """Abort the calls without an outcome, and return them; takes no lock."""
        if self._server.forked:
            return []
        left = []
        for call in self._calls:
            if call.outcome is None and call.settle(call.finish("abort") if error is None else fresh(error)):
                left.append(call)
        for call in left:
            self._server.abort(call)
        return left

    def _give_back(self) -> None:
        release = self._release
        if release is not None and not self._open and all(call.ended for call in self._calls):
            self._release = None
            release(self._channel)


def _result(call: Call, read: Sequence[Delta]) -> Response | BaseException:
    try:
        return call.response(read)
    except LMBridgeError as error:
        return error


def _as_error(error: BaseException) -> LMBridgeError:
    return error if isinstance(error, LMBridgeError) else LMBridgeError(repr(error))
