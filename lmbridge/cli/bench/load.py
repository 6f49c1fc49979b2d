"""The load: so many clients, each a thread of its own, send prompts and time what comes back.

Rule: knows neither bridge nor HTTP. A ``Target`` is used on the clients' threads; each row is its client's until it has
ended, and all else belongs to the main thread. Times are seconds on the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

STOP_PATIENCE = 2.0  # seconds in which a round that was stopped waits for its clients


@dataclass(slots=True)
class Row:
    """One request as its client saw it.

    Attributes:
        number: counts from 0 within the round.
        client: the thread that sent it.
        round: the round that it belongs to.
        due: when it was to be sent, in seconds since the round began; earlier than ``sent`` only where a rate is
            asked for and every client was busy.
        sent: when it was sent, likewise.
        first_token: seconds from ``due`` to the first token; None where that cannot be seen.
        total: seconds from ``due`` to the end.
        queued: seconds from ``sent`` until the engine took it; None where that is not told.
        prompt_tokens, completion_tokens: None where they are not told.
        finish_reason: as the engine told it.
        outcome: ``interrupted`` is what Ctrl-C found on its way.
        error: the kind of error that a failed request ended with.
        message: what that error says.
        gaps: seconds between one token and the next, for every token but the first.
    """

    number: int
    client: int
    round: int
    due: float = 0.0
    sent: float = 0.0
    first_token: float | None = None
    total: float = 0.0
    queued: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    outcome: Literal["ok", "error", "interrupted"] = "ok"
    error: str | None = None
    message: str | None = None
    gaps: list[float] = field(default_factory=list)
    _due_at: float = 0.0
    _last: float = 0.0

    def begin(self, round_began: float, due: float | None) -> None:
        """It is being sent now."""
        now = time.monotonic()
        self.sent = now - round_began
        self.due = self.sent if due is None else due
        self._due_at = round_began + self.due

    def grew(self, tokens: int) -> None:
        """So many new tokens have come, as one piece: their share of the wait for the piece is the gap of each."""
        if tokens < 1:
            return
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now - self._due_at
        else:
            self.gaps += [(now - self._last) / tokens] * tokens
        self._last = now
        self.completion_tokens = (self.completion_tokens or 0) + tokens

    def end(self) -> None:
        """Its last word has come."""
        self.total = time.monotonic() - self._due_at


Ask = Callable[[str, Row], None]
"""Sends a prompt and returns after the last word, with what came noted in the row; raises what went wrong."""


class Target(Protocol):
    """What is put under load."""

    def connect(self, client: int) -> Ask:
        """What the client of that number asks with. Called on the client's own thread."""

    def stop(self) -> None:
        """End what is on its way; nothing more will be asked."""

    def kind(self, error: BaseException) -> str:
        """The name under which such errors are counted."""


class Round:
    """Some prompts, sent by some clients at once.

    Without ``arrivals`` each client sends its next prompt once it has its answer. With them (seconds since the
    beginning, one per prompt) a prompt waits for its time, and then for a free client; that wait counts.
    """

    def __init__(
        self,
        target: Target,
        prompts: Sequence[str],
        clients: int,
        arrivals: Sequence[float] | None = None,
        number: int = 1,
    ) -> None:
        self.number = number
        self.rows: list[Row] = []
        self.seconds = 0.0
        self._target = target
        self._clients = min(clients, len(prompts))
        times: Sequence[float | None] = arrivals or [None] * len(prompts)
        self._waiting = deque(zip(range(len(prompts)), times, prompts, strict=True))  # popped by the clients; atomic
        self._ended: list[Row] = []  # appended to by the clients
        self._reports: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each of these
        self._on_their_way: dict[int, Row] = {}  # by client; each key is written by its own thread only
        self._stopping = threading.Event()
        self._expected = len(prompts)
        self._threads = [
            threading.Thread(target=self._work, args=(client,), name=f"bench {client}", daemon=True)
            for client in range(self._clients)
        ]
        self._began = 0.0  # written before the clients start

    def run(self, on_row: Callable[[], None]) -> None:
        """Send everything; ``rows`` and ``seconds`` hold what was measured, also when this raises.

        Raises:
            KeyboardInterrupt: Ctrl-C; the measured time has ended, and ``close`` stops what is on its way.
        """
        self._began = time.monotonic()
        try:
            for thread in self._threads:
                thread.start()
            for _ in range(self._expected):
                self._reports.get()
                on_row()
        finally:
            self._end()

    def close(self) -> None:
        """Stop what is on its way.

        A client that hears nothing from a server cannot be woken; it is a daemon, and left behind.
        """
        self._stopping.set()
        late = len(self._ended) < self._expected
        if late:
            self._target.stop()
        patience = time.monotonic() + STOP_PATIENCE
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, patience - time.monotonic()) if late else None)

    def _end(self) -> None:
        """End the measured time now: all that has not ended is interrupted, whatever comes of it later."""
        running = list(self._on_their_way.values())  # before those that have ended, or one could be in neither
        self.rows = list(self._ended)
        self.seconds = time.monotonic() - self._began
        ended = {row.number for row in self.rows}
        for row in running:
            if row.number not in ended:
                twin = dataclasses.replace(row, outcome="interrupted", error=None, message=None, gaps=[*row.gaps])
                twin.total = self.seconds - row.due
                self.rows.append(twin)

    # --- on the clients' threads ---

    def _work(self, client: int) -> None:
        ask: Ask | None = None
        while not self._stopping.is_set():
            try:
                number, due, prompt = self._waiting.popleft()
            except IndexError:
                return
            if due is not None and self._stopping.wait(max(0.0, self._began + due - time.monotonic())):
                return
            row = Row(number, client, self.number)
            row.begin(self._began, due)
            self._on_their_way[client] = row
            try:
                ask = ask or self._target.connect(client)
                ask(prompt, row)
            except BaseException as error:  # a panic in native code too: a request without a report hangs the round
                row.outcome = "error"
                row.error, row.message = self._target.kind(error), str(error)
            row.end()
            self._ended.append(row)
            self._reports.put(None)
            del self._on_their_way[client]


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Random times of arrival, in seconds from the beginning, ``rate`` of them a second on average."""
    random_numbers = random.Random(seed)
    now = 0.0
    while True:
        now += random_numbers.expovariate(rate)
        yield now
