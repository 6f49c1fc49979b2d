"""Generates the load: clients, each a thread of its own, send prompts and time the answers.

Rule: knows neither bridge nor HTTP. A ``Target`` is used on the clients' threads; a row belongs to its client until it
has ended, and all else belongs to the main thread. Times are seconds on the monotonic clock.
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

STOP_PATIENCE = 2.0  # seconds for which a stopped round waits for its clients


@dataclass(slots=True)
class Row:
    """One request as its client saw it.

    Attributes:
        number: counts from 0 within the round.
        client: the thread that sent it.
        round: the round that it belongs to.
        due: when it should be sent, in seconds since the round began; earlier than ``sent`` only with ``--rate``, if
            every client was busy.
        sent: when it was sent, likewise.
        first_token: seconds from ``due`` to the first token; None if unknown.
        total: seconds from ``due`` to the end.
        queued: seconds from ``sent`` until the engine took it; None if unknown.
        prompt_tokens, completion_tokens: None if unknown.
        finish_reason: as reported by the engine.
        outcome: ``interrupted`` if Ctrl-C came before its end.
        error: the kind of error that a failed request ended with.
        message: that error's message.
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
        """Note that it is being sent now."""
        now = time.monotonic()
        self.sent = now - round_began
        self.due = self.sent if due is None else due
        self._due_at = round_began + self.due

    def grew(self, tokens: int) -> None:
        """Note ``tokens`` new tokens in one piece; each gets an equal share of the wait for the piece as its gap."""
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
        """Note that the answer is complete, or has failed."""
        self.total = time.monotonic() - self._due_at


Ask = Callable[[str, Row], None]
"""Sends a prompt, notes the answer in the row, and returns at its end; raises the error of a failed request."""


class Target(Protocol):
    """The model or server under load."""

    def connect(self, client: int) -> Ask:
        """Return the function with which a client sends prompts. Called on the client's own thread."""

    def stop(self) -> None:
        """Cancel the requests in flight; no more will be sent."""

    def kind(self, error: BaseException) -> str:
        """The name under which to count such errors."""


class Round:
    """A number of prompts, sent by several clients at once.

    Without ``arrivals``, a client sends its next prompt once it has its answer. With them (seconds since the beginning,
    one per prompt), a prompt waits for its time, and then for a free client; the second wait counts.
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
        """Send everything; ``rows`` and ``seconds`` hold the measurements, even if this raises.

        Raises:
            KeyboardInterrupt: Ctrl-C; the measured time has ended, and ``close`` cancels the requests in flight.
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
        """Cancel the requests in flight, and wait for the clients.

        A client that waits for a silent server cannot be woken; its thread is a daemon and is left behind.
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
        """End the measured time now: requests that have not ended count as interrupted, whatever comes of them."""
        running = list(self._on_their_way.values())  # read before _ended, or a request could be in neither
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
            except BaseException as error:  # even a panic of native code: a request without a report hangs the round
                row.outcome = "error"
                row.error, row.message = self._target.kind(error), str(error)
            row.end()
            self._ended.append(row)
            self._reports.put(None)
            del self._on_their_way[client]


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Random arrival times, in seconds from the beginning, ``rate`` per second on average."""
    random_numbers = random.Random(seed)
    now = 0.0
    while True:
        now += random_numbers.expovariate(rate)
        yield now
