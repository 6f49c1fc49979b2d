"""One request on its way: what the caller's end and the loop end share, and its one outcome.

Rule: no thread is known here. What is written by one end only says by which.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from lmbridge.crossing.channel import Channel
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Delta, FinishReason, Outcome, Request, Response, Timings, Usage, join_deltas

MERGED = 64  # deltas are merged in lots of so many, so that memory goes with the text and not with the steps


class Owner(Protocol):
    """In whose name a call is made. Once ``closed`` is set, its calls end with a copy of it."""

    @property
    def closed(self) -> LMBridgeError | None: ...


class Call:
    """One request on its way: what the caller's end and the loop end share."""

    __slots__ = (
        "request", "channel", "owner", "streaming", "kept", "admitted", "ended", "outcomes", "deltas", "signalled",
        "read", "began", "first_token", "tokens", "heard", "limit", "_lots", "__weakref__",
    )  # fmt: skip

    def __init__(self, request: Request, channel: Channel[Call], owner: Owner, streaming: bool = False) -> None:
        self.request = request
        self.channel = channel  # its tokens come back by this one; written by the reader only
        self.owner = owner
        self.streaming = streaming  # a token per engine step, not only at the end
        self.kept = False  # somebody who may take his time holds it, and ends it if he goes; written before it is sent
        self.admitted = False  # it has been given a place at the gate; written under the gate's lock
        self.outcomes: list[Outcome] = []  # the ends that were proposed by any thread; the first one counts
        self.ended = False  # the final word has been said; written by the server thread, read by anyone
        self.deltas: deque[Delta] = deque()  # what came and was not read: the server adds, the reader takes
        self.signalled = False  # a token is on its way; the reader clears it before it looks
        self.read: list[Delta] = []  # what was read; its reader only, as is the next
        self._lots = 0  # how many of them, from the first, are merged already
        self.began: float | None = None  # monotonic times, written by the server thread, as are the rest
        self.first_token: float | None = None
        self.tokens = 0
        self.heard = 0  # the engine's progress when it last said something of this call
        self.limit = MERGED  # how many deltas may wait before some are merged

    def settle(self, outcome: Outcome) -> bool:
        """Try to be the one outcome; False when another was first. Any thread, any moment, no lock.

        ``list.append`` is one atomic step that decides and records, so nothing can come between the two.
        """
        self.outcomes.append(outcome)
        return self.outcomes[0] is outcome

    @property
    def outcome(self) -> Outcome | None:
        return self.outcomes[0] if self.outcomes else None

    # --- the loop end ---

    def merge(self) -> None:
        """Make one of the last deltas, while the reader may take the others. Server thread only."""
        last: list[Delta] = []
        try:
            while len(last) < MERGED:
                last.append(self.deltas.pop())
        except IndexError:
            if not last:
                return
        last.reverse()
        self.deltas.append(join_deltas(last))
        self.limit = len(self.deltas) + MERGED - 1

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> Response:
        """The outcome of a call that ends now without an error; tokens are counted where the engine does not."""
        created, now = self.request.created, time.monotonic()
        first_token = None if self.first_token is None else self.first_token - created
        timings = Timings((self.began or now) - created, first_token, now - created)
        usage = usage or Usage(completion_tokens=self.tokens)
        return Response("", [], reason, usage, timings, None, self.request.id)

    # --- the caller's end: one reader at a time ---

    def take(self) -> Delta | None:
        """All that came since the last take, merged; None when nothing did."""
        self.signalled = False  # before looking, so that what comes now sends a new token
        deltas = self.deltas
        if not deltas:
            return None
        try:
            delta = deltas.popleft()
            if deltas:
                delta = self._take_rest(delta)
        except IndexError:  # the server merges them at this moment, and will signal again
            return None
        self.read.append(delta)
        if len(self.read) - self._lots == MERGED:
            self.read[self._lots :] = [join_deltas(self.read[self._lots :])]
            self._lots += 1
        return delta

    def _take_rest(self, first: Delta) -> Delta:
        taken = [first]
        try:
            while True:
                taken.append(self.deltas.popleft())
        except IndexError:
            return join_deltas(taken)

    def response(self) -> Response:
        """The whole answer of a call that has an outcome.

        Raises:
            BaseException: the call's error, with the text generated before it as ``partial``.
        """
        outcome = self.outcomes[0]
        if not isinstance(outcome, Response):
            raise self.error(outcome)
        deltas = [*self.read, *self.deltas]
        if deltas:
            whole = deltas[0] if len(deltas) == 1 else join_deltas(deltas)
            outcome.text, outcome.token_ids, outcome.logprobs = whole.text, whole.token_ids, whole.logprobs
            outcome.value, outcome.reasoning, outcome.tool_calls = whole.value, whole.reasoning, whole.tool_calls
            outcome.prompt_token_ids, outcome.prompt_logprobs = whole.prompt_token_ids, whole.prompt_logprobs
        return outcome

    def error(self, outcome: BaseException) -> BaseException:
        """The call's error, completed with what its waiter knows."""
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = self.request.id
            outcome.partial = "".join([delta.text for delta in [*self.read, *self.deltas]])
        return outcome

    def result(self) -> Response | BaseException:
        """``response``, with an error given back rather than raised."""
        outcome = self.outcomes[0]
        return self.response() if isinstance(outcome, Response) else self.error(outcome)
