"""ExLlama's generator, on the thread that owns it.

Rule: everything under "generation thread" runs there, the rest on the server thread. They exchange data through two
deques, each filled by one side and emptied by the other, so neither waits for the other.

ExLlama's own async wrappers are not used: they call ``iterate()`` on the loop, which then blocks while a prompt is
read, with every deadline, abort and health check; and a device could not be shared. Everything that touches the
generator (``enqueue``, ``cancel``, ``iterate``) happens on the thread that loaded the model, whose current stream
ExLlama sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines.ailments import is_sticky
from lmbridge.engines.base import Party, engine_error
from lmbridge.engines.standing import where_is
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineDeadError
from lmbridge.log import shown
from lmbridge.messages import FinishReason, Logprobs

_REASONS: Mapping[str, FinishReason] = {"stop_token": "stop", "max_new_tokens": "length", "end_filter": "stop"}
"""ExLlama's ``eos_reason``; other reasons need settings that are never used."""


@dataclass
class News:
    """The news of a job since the last look.

    Attributes:
        tokens: new tokens of its answer, without the end token.
        logprobs: one entry per token, if requested.
        reason: why it has ended.
        error: what has ended it.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    error: BaseException | None = None

    def add(self, other: News) -> None:
        """Append later news."""
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.reason = self.reason or other.reason
        self.error = self.error or other.error


class Job:
    """One request in the generator; server thread, except as marked.

    Attributes:
        inner: ExLlama's job, while it is in the generator. Generation thread.
        moves: how often the generator has reported on it.
        waits: it is queued in the generator, without cache yet.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.inner: Any = None
        self.moves = 0
        self.waits = True
        self.ended = False
        self._news = News()
        self._bell = asyncio.Event()

    def tell(self, news: News) -> None:
        """Store news until it is read, merged into one piece."""
        self.ended = self.ended or news.reason is not None or news.error is not None
        self._news.add(news)
        self._bell.set()

    async def news(self) -> News:
        """All news since the last call, as soon as there is any."""
        await self._bell.wait()
        self._bell.clear()
        news, self._news = self._news, News()
        return news


class Generation:
    """ExLlama's generator, stepping while it has jobs.

    Args:
        thread: owns the generator, and has loaded its model.
        on_end: called once with the reason when it cannot go on; its jobs get no more news.

    Attributes:
        steps, tokens: counts so far.
    """

    def __init__(
        self, thread: EngineThread, generator: Any, party: Party, on_end: Callable[[BaseException], None]
    ) -> None:
        self.steps = self.tokens = 0
        self._thread, self._party, self._on_end = thread, party, on_end
        self._generator: Any = generator  # None once it is closed
        self._loop = asyncio.get_running_loop()
        self._orders: deque[Callable[[], None]] = deque()  # filled here, emptied by the generation thread
        self._told: deque[tuple[Job, str, News]] = deque()  # filled there, emptied here
        self._jobs: dict[Any, Job] = {}  # by ExLlama's; generation thread
        self._ident: int | None = None  # of the generation thread; set there
        self._closing = False  # set here
        self._dead: BaseException | None = None
        self._work: asyncio.Task[None] | None = None  # set while there is work

    def begin(self, make: Callable[[], Any]) -> Job:
        """Start the job that ``make`` returns; ``make`` is called on the generation thread.

        Raises:
            EngineDeadError: the engine has died.
        """
        if self._dead is not None or self._closing:
            raise EngineDeadError("The ExLlama engine has ended and takes no more requests.") from self._dead
        job = Job(make)
        self._order(lambda: self._enqueue(job))
        return job

    def end(self, job: Job) -> None:
        """Free what the job holds, before the next step; does nothing if it has already ended."""
        if not job.ended and self._dead is None:
            job.ended = True
            self._order(lambda: self._cancel(job))

    def progress(self, job: Job) -> int:
        """A number that changes while the generator works on the job, or on others before it."""
        return job.moves + (self.steps if job.waits else 0)

    def where(self) -> str:
        """What its thread is executing. Any thread."""
        return where_is(self._ident) if self._work is not None else ""

    async def close(self, timeout: float) -> bool:
        """Stop before the next step and release the model; False if the current step takes over ``timeout`` seconds."""
        self._closing = True
        if self._work is not None:
            await asyncio.wait([self._work], timeout=timeout)
        if self._work is not None:
            return False
        self._generator = None
        for job in self._jobs.values():
            job.inner = None
        self._jobs.clear()
        return True

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        if self._work is None:  # one caller's context must not leak to the others
            self._work = self._loop.create_task(self._serve(), name="lmbridge exllama", context=contextvars.Context())

    async def _serve(self) -> None:
        try:
            while self._orders and not self._closing:
                await self._thread.run(self._step_on)
        except Exception as cause:
            traceback.clear_frames(cause.__traceback__)  # they hold the generator, and the cache with it
            self._dead = cause
            self._orders.clear()
            self._on_end(cause)
        finally:
            self._work = None

    def _hear(self) -> None:
        """Deliver the generator's news."""
        while self._told:
            job, stage, news = self._told.popleft()
            job.moves += 1
            job.waits = job.waits and not stage
            self.tokens += len(news.tokens)
            if not job.ended:
                job.tell(news)

    # ------------------------------------------------------------------------------------------------ generation thread

    def _step_on(self) -> None:
        """Step until there is no work. An exception ends the generator: its jobs can no longer be trusted.

        Raises:
            Exception: whatever ``iterate()`` raises.
        """
        self._ident = threading.get_ident()
        while not self._closing:
            while self._orders:
                self._orders.popleft()()
            if not self._generator.num_remaining_jobs():
                return
            with self._party.turn():
                results = self._generator.iterate()
            self.steps += 1
            for result in results:
                if result["stage"] == "error" and is_sticky(result["error"]):
                    raise result["error"]
                job = self._jobs.get(result["job"])
                if job is not None:
                    self._post(job, result["stage"], read(result))
                    if result["eos"]:
                        self._forget(job)

    def _enqueue(self, job: Job) -> None:
        try:
            self._take_in(job)
        except Exception as cause:  # only this one: it is in no queue
            traceback.clear_frames(cause.__traceback__)
            self._post(job, "", News(error=engine_error(f"ExLlama refused the request: {shown(cause)}.", cause)))

    def _take_in(self, job: Job) -> None:
        inner = job.make()
        self._generator.enqueue(inner)
        job.inner, self._jobs[inner] = inner, job

    def _cancel(self, job: Job) -> None:
        inner = job.inner
        if inner is not None:  # else it has already ended, or never began
            self._forget(job)
            self._generator.cancel(inner)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.inner]
        job.inner = None  # it references the generator

    def _post(self, job: Job, stage: str, news: News) -> None:
        self._told.append((job, stage, news))
        if len(self._told) <= 1:  # of several, the first has called for whoever empties it, and has not been taken yet
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is waiting
                self._loop.call_soon_threadsafe(self._hear)


def read(result: Mapping[str, Any]) -> News:
    """Read one of ExLlama's results."""
    if result["stage"] == "error":
        cause = result["error"]
        traceback.clear_frames(cause.__traceback__)
        return News(error=engine_error(f"ExLlama failed the request: {shown(cause)}.", cause))
    if result["stage"] != "streaming":
        return News()
    news = News(reason=_REASONS.get(result.get("eos_reason", ""), "stop") if result["eos"] else None)
    for part in (result, result.get("held", {})):  # what ExLlama had held back when the answer ended
        news.tokens += part["token_ids"][0].tolist() if "token_ids" in part else []
        news.logprobs += _logprobs(part) if "token_probs" in part else []
    if result.get("eos_reason") == "stop_token":  # it comes last and is excluded from the answer
        news.tokens, news.logprobs = news.tokens[:-1], news.logprobs[:-1]
    return news


def _logprobs(part: Mapping[str, Any]) -> list[Logprobs]:
    tokens, own = part["token_ids"][0].tolist(), part["token_probs"].log()[0].tolist()
    if "top_k_tokens" not in part:
        return [{token: value} for token, value in zip(tokens, own, strict=True)]
    likely, values = part["top_k_tokens"][0].tolist(), part["top_k_probs"].log()[0].tolist()
    return [
        {token: value, **dict(zip(*others, strict=True))}
        for token, value, *others in zip(tokens, own, likely, values, strict=True)
    ]
