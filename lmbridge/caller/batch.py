"""A list of prompts as one call: sent as room allows, answered in order.

Rule: a batch is one consumer with one channel: a thread's own, or that of the event loop that awaits it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from lmbridge.caller.account import Account
from lmbridge.caller.sender import Sender
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Request, Response

Result = Response | BaseException
Requests = list[Request | LMBridgeError]


class Batch:
    """Runs requests to completion.

    A request that is already an exception (its prompt was refused) fills its slot.

    Args:
        keep: put errors into their slots; otherwise raise the first, with its position as ``index``.
        advance: called for each slot that is filled.
        noun: what a slot holds, for messages.
    """

    def __init__(
        self, account: Account, keep: bool, advance: Callable[[], object] = lambda: None, noun: str = "Prompt"
    ) -> None:
        self._account = account
        self._keep = keep
        self._advance = advance
        self._noun = noun
        self._results: dict[int, Result] = {}
        self._clean = True  # the server has finished with every closed call

    def run(self, requests: Requests) -> list[Result]:
        """One result per request, in order; blocks until all are done.

        Raises:
            LMBridgeError: the first error, with its position as ``index``; the rest have been aborted. With ``keep``,
                errors fill their slots instead.
        """
        if not requests:
            return []
        server = self._account.server(True)
        channel = self._account.lease(server)
        sender = Sender(self._account, server, channel)
        try:
            self._begin(requests, sender)
            while True:  # Python 3.12 and 3.13 keep the backward jump of `while not sender.done` outside the try
                if sender.done:
                    break
                sender.send()
                self._record(sender, sender.ended() or _named(channel, server, sender))
        except BaseException:
            self._leave(sender)
            raise
        if self._clean:
            self._account.take_back(server, channel)
        return [self._results[index] for index in range(len(requests))]

    async def run_async(self, requests: Requests) -> list[Result]:
        """``run`` for a task; cancelling it aborts all requests."""
        if not requests:
            return []
        server = self._account.server(False)
        port = self._account.access.port(asyncio.get_running_loop())
        sender = Sender(self._account, server, port.channel)
        news = port.listen()
        sender.opened = news.add
        try:
            self._begin(requests, sender)
            while not sender.done:
                sender.send()
                self._record(sender, sender.ended() or await news.wait(sender.remaining()) or list(sender.open))
        except BaseException:
            self._leave(sender)
            raise
        finally:
            news.close()
        return [self._results[index] for index in range(len(requests))]

    def _begin(self, requests: Requests, sender: Sender) -> None:
        for index, request in enumerate(requests):
            if isinstance(request, LMBridgeError):
                self._fill(index, request)
            else:
                sender.add(index, request)

    def _record(self, sender: Sender, calls: Iterable[Call]) -> None:
        for call in calls:
            if call.outcomes and call in sender.open:
                self._clean = self._clean and call.ended
                self._account.report(call)
                self._fill(sender.open.pop(call), call.result())

    def _fill(self, index: int, result: Result) -> None:
        if isinstance(result, LMBridgeError):
            result.index, result.listed = index, self._noun
        if isinstance(result, BaseException) and not self._keep:
            raise result
        self._results[index] = result
        self._advance()

    def _leave(self, sender: Sender) -> None:
        left = list(sender.open)  # some may have ended unnoticed
        sender.abort()
        for call in left:
            self._account.report(call)


def _named(channel: Channel[Call], server: ServerHandle, sender: Sender) -> Iterable[Call]:
    """Block for news, and return the calls that may have ended."""
    try:
        return (channel.wait(True, sender.remaining()),)
    except Empty:
        pass
    except Closed:
        for call in sender.open:
            call.settle(server.closed_error())
    return list(sender.open)


@contextmanager
def progress_bar(total: int, shown: bool, unit: str = "prompt") -> Iterator[Callable[[], object]]:
    """Yield a function that advances a progress bar, or does nothing."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=f"{unit}s", unit=unit) as bar:
        yield bar.update
