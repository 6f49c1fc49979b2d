"""A scripted encoder for tests without a model: it embeds and reranks by simple, known rules.

Rule: loads nothing and needs only numpy; its cues, those of ``ScriptedEngine``, may be given from any thread. The rest
runs on the server thread, and batches form as in a real encoder.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections.abc import Collection, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

from lmbridge.engines.base import Sink, engine_error
from lmbridge.engines.batching import Batcher
from lmbridge.errors import InvalidRequestError, PromptTooLongError
from lmbridge.messages import Delta, Embed, Request, Rerank, Task, Usage
from lmbridge.testing.scripted import STEP_PATIENCE, ScriptedEngine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DIMENSIONS = 8
TURNS = 6


class ScriptedEncoder(ScriptedEngine):
    """Makes vectors from a text's hash, and scores from the words that a document shares with the query.

    Equal texts have equal vectors, different texts different ones; ``vector_of`` and ``score_of`` return them. Each
    word counts as a token. A step is a batch: they follow each other as fast as the loop runs, or ``step_time`` seconds
    apart; with ``manual=True`` only ``step()`` makes one. ``fail``, ``refuse`` and ``forget`` name a text or document.
    Args:
        tasks: one or both of ``embed`` and ``rerank``.
        max_length: the most words of a text, or of a document with its query; None takes any.
        manual, step_time, start_error, start_gate, load_time: as for ``ScriptedEngine``.
        max_batch_size: texts in a batch.
        max_batch_tokens: words in a batch; a longer text goes alone.
    """

    name = "scripted encoder"
    supports: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        *,
        tasks: Collection[Task] = ("embed", "rerank"),
        max_length: int | None = None,
        manual: bool = False,
        step_time: float = 0.0,
        start_error: BaseException | None = None,
        start_gate: threading.Event | None = None,
        load_time: float = 0.0,
        max_batch_size: int = 64,
        max_batch_tokens: int | None = None,
    ) -> None:
        super().__init__(
            manual=manual, step_time=step_time, start_error=start_error, start_gate=start_gate, load_time=load_time,
            max_batch_size=max_batch_size,
        )  # fmt: skip
        self.tasks = frozenset(tasks)
        self.batches: list[list[str]] = []  # the texts of each batch; appended on the server thread, read by anyone
        self._max_length = max_length
        self._batcher: Batcher[Embed | Rerank] = Batcher(
            self._encode, max_items=max_batch_size, max_size=max_batch_tokens
        )
        self._gate: asyncio.Future[None] | None = None  # holds a batch back; server thread only, like the next
        self._stepper: asyncio.Task[None] | None = None

    # --- cues, from any thread ---

    def step(self, count: int = 1) -> None:
        """Run ``count`` batches, fewer if nothing waits; returns once their results are delivered.

        Raises:
            TimeoutError: the loop did not run them within ``STEP_PATIENCE`` seconds.
        """
        done = threading.Event()

        async def steps() -> None:
            for _ in range(count):
                await self._step_once()
            done.set()

        self._on_loop(lambda: self._begin(steps()))
        if not done.wait(STEP_PATIENCE):
            raise TimeoutError(f"the loop ran no batches for {STEP_PATIENCE:g} s: it is blocked, or has ended")

    @property
    def active(self) -> int:
        """How many texts it is working on."""
        return len(self._batcher)

    # --- the engine contract ---

    def add_request(self, request: Request, sink: Sink) -> None:
        self.threads.add(threading.get_ident())
        job = request.job
        assert isinstance(job, (Embed, Rerank))
        text = _name_of(job)
        if text in self._refusing:
            raise self._refusing.pop(text)
        words = _words_of(job)
        self._check_length(job, words)
        if isinstance(job, Embed):
            _check_dimensions(job)
        say = functools.partial(self._say, text, sink)
        self._batcher.add(request.id, job, say, size=words, usage=Usage(prompt_tokens=words))
        self._tell(lambda: self.started.append(request.id))

    def abort_request(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        if not self._stalled and self._batcher.discard(request_id):
            self._tell(lambda: self.aborted.append(request_id))

    def progress(self, request_id: str) -> int | None:
        return self._batcher.batches if request_id in self._batcher else None

    def stats(self) -> dict[str, float]:
        return {
            "in_flight": float(len(self._batcher)),
            "batches": float(self._batcher.batches),
            "items": float(self._batcher.items),
            "tokens": float(self._batcher.size),
            "max_batch_size": float(self.max_batch_size),
        }

    async def close(self) -> None:
        self._batcher.close()
        if self._stepper is not None:
            self._stepper.cancel()
        await super().close()

    # --- stepping, on the server thread ---

    async def _encode(self, jobs: list[Embed | Rerank]) -> list[Any]:
        """Run one batch when it is time; the result of each text."""
        await self._turn()
        texts = [_name_of(job) for job in jobs]
        self._tell(lambda: self.batches.append(texts))
        self._tell(lambda: setattr(self, "steps", self.steps + 1))
        self.tokens += sum(map(_words_of, jobs))
        return [self._result(job, text) for job, text in zip(jobs, texts, strict=True)]

    async def _turn(self) -> None:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._manual:
            self._gate = gate
            await gate
        else:
            await asyncio.sleep(self._step_time)
        if self._stalled:
            await asyncio.get_running_loop().create_future()

    async def _step_once(self) -> None:
        await _turns()  # let what was just added form its batch
        if self._gate is not None:
            self._gate.set_result(None)
            self._gate = None
        await _turns()  # let the batch deliver its results

    def _begin(self, steps: Coroutine[Any, Any, None]) -> None:
        self._stepper = asyncio.get_running_loop().create_task(steps, name="scripted steps")

    def _result(self, job: Embed | Rerank, text: str) -> Any:
        if text in self._failing:
            return engine_error(f"scripted failure of {text!r}", self._failing.pop(text))
        return vector_of(job) if isinstance(job, Embed) else score_of(job.query, job.document)

    def _say(self, text: str, sink: Sink, delta: Delta) -> None:
        if text not in self._forgetting:
            sink(delta)
        self._tell(lambda: None)

    def _check_length(self, job: Embed | Rerank, words: int) -> None:
        if self._max_length is not None and words > self._max_length and job.truncate == "error":
            raise PromptTooLongError(f"It has {words} tokens; the model reads at most {self._max_length}.")


async def _turns() -> None:
    """Yield for as many turns of the loop as a batch needs."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def vector_of(text: str | Embed) -> npt.NDArray[np.float32]:
    """The vector that ``ScriptedEncoder`` makes of a text: float32 of shape ``(8,)``, and of length 1 for a string."""
    import numpy as np

    job = text if isinstance(text, Embed) else Embed(text)
    digest = hashlib.sha256(f"{job.prompt or ''}{_name_of(job)}".encode()).digest()
    vector = (np.frombuffer(digest, dtype="<u4") / 2**31 - 1).astype(np.float32)[: job.dimensions]
    return vector / np.linalg.norm(vector) if job.normalize else vector


def score_of(query: str, document: str) -> float:
    """The relevance that ``ScriptedEncoder`` finds: the share of the query's words that the document has."""
    wanted = set(query.lower().split())
    return len(wanted & set(document.lower().split())) / len(wanted) if wanted else 0.0


def _name_of(job: Embed | Rerank) -> str:
    """Its name in cues: its text or document, or its joined token ids."""
    text = job.text if isinstance(job, Embed) else job.document
    return text if isinstance(text, str) else " ".join(map(str, text))


def _words_of(job: Embed | Rerank) -> int:
    words = len(_name_of(job).split())
    return words + len(job.query.split()) if isinstance(job, Rerank) else words


def _check_dimensions(job: Embed) -> None:
    if job.dimensions is not None and job.dimensions > DIMENSIONS:
        message = f"The model's vectors have {DIMENSIONS} dimensions, so {job.dimensions} cannot be kept."
        raise InvalidRequestError(message, "dimensions")
