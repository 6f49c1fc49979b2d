"""One request in flight: the state shared by the caller's end and the loop end, and its one outcome.

Rule: no thread is known here. Fields written by only one end say which.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from lmbridge.crossing.channel import Channel
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Delta, FinishReason, Outcome, Request, Response, Timings, Usage, join_deltas

MERGED = 64  # deltas are merged in lots of this many, so that memory grows with the text, not the steps


class Owner(Protocol):
    """The account of a call. Once ``closed`` is set, its calls end with a copy of it."""

    @property
    def closed(self) -> LMBridgeError | None: ...


class Call:
    """One request in flight: the state shared by the caller's end and the loop end."""

    __slots__ = (
        "request", "channel", "owner", "streaming", "kept", "admitted", "ended", "outcomes", "deltas", "signalled",
        "read", "began", "first_token", "tokens", "heard", "limit", "_lots", "__weakref__",
    )  # fmt: skip

    def __init__(self, request: Request, channel: Channel[Call], owner: Owner, streaming: bool = False) -> None:
        self.request = request
        self.channel = channel  # carries its tokens back; written by the reader only
        self.owner = owner
        self.streaming = streaming  # one token per engine step, not only at the end
        self.kept = False  # its reader may be slow, and ends it when it leaves; written before it is sent
        self.admitted = False  # admitted by the gate; written under its lock
        self.outcomes: list[Outcome] = []  # outcomes proposed by any thread; the first one counts
        self.ended = False  # the server is done with it; written by the server thread, read by anyone
        self.deltas: deque[Delta] = deque()  # unread deltas: the server appends, the reader pops
        self.signalled = False  # a token is on its way; the reader clears it before looking
        self.read: list[Delta] = []  # deltas read; reader only, like the next
        self._lots = 0  # how many of them, from the start, are merged already
        self.began: float | None = None  # monotonic times; written by the server thread, like the rest
        self.first_token: float | None = None
        self.tokens = 0
        self.heard = 0  # the engine's progress at its last delta for this call
        self.limit = MERGED  # how many deltas may be unread before some are merged

    def settle(self, outcome: Outcome) -> bool:
        """Propose the outcome; False if another was first. Any thread, any time, no lock.

        ``list.append`` is one atomic step that decides and records, so nothing can come between the two.
        """
        self.outcomes.append(outcome)
        return self.outcomes[0] is outcome

    @property
    def outcome(self) -> Outcome | None:
        return self.outcomes[0] if self.outcomes else None

    # --- the loop end ---

    def merge(self) -> None:
        """Merge the last deltas into one while the reader may take the others. Server thread only."""
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
        """The outcome of a call that ends now without an error; counts tokens if the engine does not."""
        created, now = self.request.created, time.monotonic()
        first_token = None if self.first_token is None else self.first_token - created
        timings = Timings((self.began or now) - created, first_token, now - created)
        usage = usage or Usage(completion_tokens=self.tokens)
        return Response("", [], reason, usage, timings, None, self.request.id)

    # --- the caller's end: one reader at a time ---

    def take(self) -> Delta | None:
        """Everything since the last take, merged; None if there is nothing."""
        self.signalled = False  # before looking, so that later news sends a new token
        deltas = self.deltas
        if not deltas:
            return None
        try:
            delta = deltas.popleft()
            if deltas:
                delta = self._take_rest(delta)
        except IndexError:  # the server is merging them and will signal again
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
        """The complete answer of a call that has an outcome.

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
        """The call's error, with the request's id and the partial text added."""
        if isinstance(outcome, LMBridgeError):
            outcome.request_id = self.request.id
            outcome.partial = "".join([delta.text for delta in [*self.read, *self.deltas]])
        return outcome

    def result(self) -> Response | BaseException:
        """As ``response``, but errors are returned, not raised."""
        outcome = self.outcomes[0]
        return self.response() if isinstance(outcome, Response) else self.error(outcome)
