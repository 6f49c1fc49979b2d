"""Several answers read by one thread as they grow.

Rule: the caller's end. A group is one consumer with one channel; each token names the call that has news.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lmbridge.caller.account import Account
from lmbridge.caller.sender import Sender
from lmbridge.caller.streams import drop
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Closed, Empty
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Delta, Request, Response


class StreamGroup:
    """The deltas of several answers, as they come: ``for index, delta in bridge.stream_many(prompts)``.

    The last delta of each answer has a ``finish_reason`` or an ``error``; if one answer fails, the others continue.
    Leaving the loop, ``close``, leaving a ``with`` block and dropping the group abort what is still running. Deltas
    that arrive while nobody reads are merged into the answer's next one. Prompts that do not fit into the queue are
    sent while the others are read.
    """

    def __init__(self, account: Account, requests: Sequence[Request | LMBridgeError], owner: object) -> None:
        """Send what there is room for; a request that is already an error ends with it.

        Raises:
            QueueFullError: there is room for none, and the bridge rejects.
            LMBridgeError: the bridge or the client is closed.
        """
        server = account.server(True)
        self._account = account
        self._server = server
        self._owner = owner  # keeps the bridge alive as long as the group
        self._channel = account.lease(server)
        self._lent = True  # the channel must be returned
        self._requests = list(requests)
        self._ends: dict[int, Call] = {}  # reader only, like the next three
        self._news: deque[tuple[int, Delta]] = deque()
        self._iterated = False
        self._sender = Sender(account, server, self._channel, streaming=True)
        self._turn = threading.Lock()  # held by the thread that reads
        for index, request in enumerate(requests):
            if isinstance(request, LMBridgeError):
                self._news.append((index, Delta(error=request)))
            else:
                self._sender.add(index, request)
        try:
            self._sender.send()
        except BaseException:
            self._leave()
            for call in list(self._sender.open):
                account.report(call)
            raise

    @property
    def request_ids(self) -> list[str]:
        """One id per prompt; "" for an invalid one."""
        return ["" if isinstance(request, LMBridgeError) else request.id for request in self._requests]

    @property
    def responses(self) -> list[Response | BaseException]:
        """The results in the order of the prompts; each is a complete Response or an error.

        Raises:
            RuntimeError: the group has not ended yet.
        """
        ends = {**self._ends, **{index: call for call, index in list(self._sender.open.items())}}
        results = [self._result(request, ends.get(index)) for index, request in enumerate(self._requests)]
        if None in results:
            raise RuntimeError("The answers are not complete yet: read the group to the end or close it first.")
        return [result for result in results if result is not None]

    def __iter__(self) -> Iterator[tuple[int, Delta]]:
        if self._iterated:
            raise RuntimeError("A group of streams can be iterated only once; its complete answers are in .responses.")
        self._iterated = True
        return self._iterate()

    def _iterate(self) -> Iterator[tuple[int, Delta]]:
        # A separate generator, so that `break` drops it and this finally runs at once.
        try:
            while self.wait():
                try:
                    yield next(self)
                except StopIteration:
                    return
        finally:
            self._leave()

    def __next__(self) -> tuple[int, Delta]:
        """The next delta of any answer, with the index of its prompt; raises StopIteration once all have ended."""
        with self._reading():
            self._wait(None)
            news = self._news.popleft() if self._news else None
        if news is None:
            raise StopIteration
        return news

    def wait(self, timeout: float | None = None) -> bool:
        """Block until ``next`` would return at once; False after ``timeout`` seconds.

        Raises:
            RuntimeError: another thread is reading.
            ForkedError: the group belongs to the parent process.
        """
        with self._reading():
            return self._wait(None if timeout is None else time.monotonic() + timeout)

    def stop(self, index: int) -> None:
        """End the answer to that prompt; its last delta says ``abort``; the others continue. Any thread, any time."""
        self._sender.stop(index)

    def close(self, error: LMBridgeError | None = None) -> None:
        """Abort what is still running; a reader in another thread sees the end. Any thread, any time.

        Args:
            error: the reader gets this error for each answer instead, and it counts as their outcome.
        """
        if self._server.forked:
            return
        for call in self._leave(error):
            self._channel.nudge(call)
        for call in list(self._sender.open):
            self._account.report(call)

    def __enter__(self) -> StreamGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_turn"):
            drop(self._leave)
            for call in list(self._sender.open):
                self._account.report_later(call)

    # --- reading ---

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Be the only reading thread; KeyboardInterrupt and the like abort all, since nobody reads on."""
        self._server.check_process()
        if not self._turn.acquire(False):
            raise RuntimeError("Another thread is reading this group; give each thread its own.")
        try:
            yield
        except BaseException:
            self._leave()
            raise
        finally:
            self._give_back()
            self._turn.release()

    def _wait(self, limit: float | None) -> bool:
        while not self._news and not self._sender.done:
            if limit is not None and time.monotonic() >= limit:
                return False
            self._look(limit)
        return True

    def _look(self, limit: float | None) -> None:
        """Wait for one token and take its call's news."""
        self._sender.send()
        ended = self._sender.ended()
        for call in ended:
            self._take(call)
        if ended:
            return
        remaining = self._sender.remaining()
        if limit is not None:
            remaining = min(remaining, max(0.0, limit - time.monotonic()))
        self._server.check_thread()
        try:
            self._take(self._channel.wait(True, remaining))
            return
        except Empty:
            pass
        except Closed:
            for call in self._sender.open:
                call.settle(self._server.closed_error())
        for call in list(self._sender.open):  # a token may have been lost
            self._take(call)

    def _take(self, call: Call) -> None:
        """Move a call's deltas to the news, and its end once everything was read."""
        index = self._sender.open.get(call)
        if index is None:  # a late token
            return
        call.signalled = False  # before looking, so that later news sends a new token
        outcome = call.outcome  # read before the deltas, which all precede it
        taken = call.take()
        if taken is not None:
            self._news.append((index, taken))
        if outcome is None:
            return
        del self._sender.open[call]
        self._ends[index] = call
        self._account.report(call)
        if isinstance(outcome, Response):
            if taken is None or taken.finish_reason is None:
                self._news.append((index, Delta(finish_reason=outcome.finish_reason, usage=outcome.usage)))
        elif taken is None or taken.error is None:
            self._news.append((index, Delta(error=_as_error(call.error(outcome)))))

    def _result(self, request: Request | LMBridgeError, call: Call | None) -> Response | BaseException | None:
        """The end of one answer; None if it has not ended."""
        if isinstance(request, LMBridgeError):
            return request
        if call is None:
            return None if self._sender.left is None else self._sender.unsent(request)
        return call.result() if call.outcomes else None

    def _leave(self, error: LMBridgeError | None = None) -> list[Call]:
        """Abort the calls without an outcome, and return them; takes no lock."""
        left = [] if self._server.forked else self._sender.abort(error)
        for call in left:
            self._account.report_later(call)
        return left

    def _give_back(self) -> None:
        if (
            self._lent
            and self._sender.done
            and all(isinstance(end, LMBridgeError) or end.ended for end in self._ends.values())
        ):
            self._lent = False
            self._account.take_back(self._server, self._channel)


def _as_error(error: BaseException) -> LMBridgeError:
    return error if isinstance(error, LMBridgeError) else LMBridgeError(repr(error))
