"""The plain runner: each request is a ``generate`` of its own, and they take turns run by run.

Rule: of transformers only what its documentation knows of ``generate``, so that it serves every causal language model.
Each request has a thread; whoever holds the turn is the only one inside transformers. A turn is one run of the model:
a token, or a chunk of a long prompt. It passes on in front of the next run, in a hook that torch documents, and a
request that was cancelled meanwhile ends there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.plan import Plan
from lmbridge.engines.transformers.reading import Reader
from lmbridge.engines.transformers.runner import (
    NO_LIMIT,
    Listener,
    Runner,
    Witness,
    context_of,
    generating,
    rope_kind,
    still,
    thread_count,
    use_threads,
)
from lmbridge.engines.transformers.sampling import Sampler

CHUNK = 256
"""The default number of prompt tokens per run."""
CHECKED_REQUESTS = 2
"""Those of the self-check, which begin together: or the first might end before it had to share the model."""
CHECKED_CHUNK = 4
"""The same during the self-check, whose prompts are short: models that keep a state may not be read in pieces."""


class PlainRunner(Runner):
    """A model that runs one request at a time, in turns.

    Attributes:
        chunk: tokens of a prompt in one run; None reads every prompt at once.
    """

    name = "plain"

    def __init__(self, model: Any, options: ModelOptions, *, chunked: bool = True, interleaved: bool = True) -> None:
        """
        Args:
            chunked: read long prompts in pieces, which some models cannot continue.
            interleaved: pass the turn on after each run instead of after each request; some models keep a request's
                state inside themselves.
        """
        self._model = model
        self._threads = thread_count(model, options)
        self._chunk = options.max_chunk_size or CHUNK
        self.chunk: int | None = CHECKED_CHUNK if chunked else None
        self.room = context_of(model, options) or NO_LIMIT
        self.capacity = self.room * options.max_batch_size
        self._size: int = model.get_output_embeddings().weight.shape[0]
        self._keeps_rope = rope_kind(model) == "dynamic"
        if rope_kind(model) in ("dynamic", "longrope"):
            self.chunk = None  # its factor follows the end of what is read at once
        self._reader = Reader(model, pieces=self.chunk is not None)
        self._turns = _Turns(CHECKED_REQUESTS if options.self_check else 0)
        self._interleaved = interleaved
        self._jobs: dict[str, _Job] = {}  # server thread only
        self._inside = threading.local()  # .job: what the thread works on
        self._hook = model.register_forward_pre_hook(self._before_run)
        self._witness = Witness(model)  # after the hook in which requests wait: it watches who runs
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        self._listener = listener
        self._loop = loop
        generating(self)

    def proved(self) -> None:
        if self.chunk is not None:
            self.chunk = self._chunk

    def add(self, key: str, prompt: list[int], budget: int, stop_ids: Sequence[int], plan: Plan) -> None:
        known = [token for token in stop_ids if token < self._size]  # callers may name what there is not
        job = self._jobs[key] = _Job(key, prompt, budget, known, plan)
        thread = threading.Thread(target=self._work, args=(job,), name="lmbridge generation", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more of them
            del self._jobs[key]
            raise

    def cancel(self, key: str) -> None:
        job = self._jobs.pop(key, None)
        if job is not None:
            job.cancelled = True
            self._turns.leave(job)

    def waits(self, key: str) -> bool:
        job = self._jobs.get(key)
        return job is not None and job.waits

    def footprint(self) -> int:
        """Of the model; what requests have in their caches comes and goes with them."""
        return int(self._model.get_memory_footprint())

    @property
    def steps(self) -> int:
        return self._witness.steps

    def where(self) -> str:
        return self._witness.where() or f"step {self.steps} has ended and no other has begun"

    def halt(self, timeout: float) -> bool:
        ended = self._turns.close(timeout)
        if ended:
            still(self)
        return ended

    def close(self, timeout: float) -> bool:
        ended = self.halt(timeout)
        self._hook.remove()
        self._witness.close()
        self._jobs.clear()
        self._model = None
        self._reader.close()
        return ended

    # ----------------------------------------------------------------------------------------------- a request's thread

    def _work(self, job: _Job) -> None:
        """Generate one answer, from the first turn to the last."""
        try:
            with self._turns.taken(job):
                use_threads(self._threads)
                self._inside.job = job
                try:
                    self._generate(job)
                finally:  # torch calls no hook for what is no Exception
                    self._witness.end_turn()
            if not job.finished:
                raise RuntimeError(f"generate ended by itself after {len(job.tokens)} of {job.budget} tokens")
        except _Cancelled:
            pass
        except BaseException as error:
            self._tell(self._on_failure, job, error)

    def _generate(self, job: _Job) -> None:
        if job.plan.reading is not None:
            self._reader.read(job.plan.reading, job.prompt)
        with torch.inference_mode():
            ids = torch.tensor([job.prompt], device=self._model.device)
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=transformers.GenerationConfig(
                    do_sample=False,
                    max_new_tokens=job.budget,
                    eos_token_id=job.stop_ids or None,
                    pad_token_id=0,
                    prefill_chunk_size=self.chunk if self.chunk is not None and self.chunk < len(job.prompt) else None,
                ),
                logits_processor=transformers.LogitsProcessorList([_Chooser(self, job, self._size)]),
            )

    def _before_run(self, model: Any, inputs: Any) -> None:
        """In front of each run: to the end of the line, unless it is the first one or not a request's."""
        job: _Job | None = getattr(self._inside, "job", None)
        if job is None:
            return
        if job.cancelled or self._turns.closed:
            raise _Cancelled
        if job.plan.steps and self._interleaved:
            self._turns.go_round(job)
        job.plan.steps += 1
        if self._keeps_rope:
            self._reset_rope(job)

    def _reset_rope(self, job: _Job) -> None:
        """Undo what the last run of a dynamic rope has left in the model: a run of one token resets it."""
        self._inside.job = None
        self._model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self._model.device), use_cache=False)
        self._inside.job = job

    def chosen(self, job: _Job, token: int) -> None:
        """Record the job's next token."""
        job.tokens.append(token)
        job.finished = token in job.stop_ids or len(job.tokens) >= job.budget
        self._tell(self._on_tokens, job, job.tokens[:], job.finished)

    def _tell(self, method: Any, *args: Any) -> None:
        """Call a method on the loop; if that is closed, nobody is waiting."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(method, *args)

    # ---------------------------------------------------------------------------------------------------- server thread

    def _on_tokens(self, job: _Job, tokens: list[int], finished: bool) -> None:
        if self._jobs.get(job.key) is job and not self._turns.closed:
            if finished:
                del self._jobs[job.key]
            self._listener.on_tokens(job.key, tokens, finished)

    def _on_failure(self, job: _Job, error: BaseException) -> None:
        if self._jobs.pop(job.key, None) is job and not self._turns.closed:
            if isinstance(error, Exception) and not _is_of_the_device(error):
                self._listener.on_failure(job.key, error)
            else:
                self._listener.on_end(error)


class _Job:
    """One request. Written by its own thread, but for ``cancelled`` (server thread)."""

    def __init__(self, key: str, prompt: list[int], budget: int, stop_ids: list[int], plan: Plan) -> None:
        self.key, self.prompt, self.budget, self.stop_ids, self.plan = key, prompt, budget, stop_ids, plan
        self.tokens: list[int] = []
        self.finished = False
        self.cancelled = False
        self.turn = threading.Semaphore(0)
        self.waits = False  # for the turn
        self.begun = False  # has had one
        self.left = False  # was taken out of the line before that

    def await_turn(self) -> None:
        """Wait for the turn; its holder passes it on in any case."""
        self.waits = True
        self.turn.acquire()
        self.waits = False


class _Cancelled(BaseException):
    """Leaves ``generate`` when its request is cancelled or the runner closed. Error handlers must not catch it."""


class _Turns:
    """Hands the model from one request's thread to the next, in the order in which they asked.

    Args:
        awaited: how many must have asked before anybody gets a turn.
    """

    def __init__(self, awaited: int) -> None:
        self._lock = threading.Lock()
        self._line: deque[_Job] = deque()  # guarded by _lock
        self._busy = False  # guarded by _lock: somebody has the turn, or is about to
        self._awaited = awaited  # guarded by _lock
        self._free = threading.Event()  # nobody has
        self._free.set()
        self.closed = False  # nobody gets one any more

    @contextlib.contextmanager
    def taken(self, job: _Job) -> Any:
        """While the caller has the turn.

        Raises:
            _Cancelled: there will be none.
        """
        self._take(job)
        try:
            yield
        finally:
            self._pass_on()

    def go_round(self, job: _Job) -> None:
        """Pass the turn to the longest-waiting job, and wait for the next.

        Raises:
            _Cancelled: there will be none; whoever has been inside ``taken`` gives back a turn then that he has.
        """
        with self._lock:
            following = self._line.popleft() if self._line else job
            if following is not job:
                self._line.append(job)
        if following is not job:
            following.turn.release()
            job.await_turn()
        if job.cancelled or self.closed:
            raise _Cancelled

    def leave(self, job: _Job) -> None:
        """Take a job that has not begun out of the line, where it might stand until all before it have ended."""
        with self._lock:
            if job.begun or job not in self._line:
                return
            self._line.remove(job)
            job.left = True
        job.turn.release()

    def close(self, timeout: float) -> bool:
        """Allow no more runs; returns whether the last one ends within ``timeout`` seconds."""
        self.closed = True
        with self._lock:
            self._awaited = 0
            following = self._next()
        if following is not None:  # who gets the turn now only passes it on
            following.turn.release()
        return self._free.wait(timeout)

    def _take(self, job: _Job) -> None:
        with self._lock:
            if job.cancelled or self.closed:
                raise _Cancelled
            self._line.append(job)
            self._awaited = max(0, self._awaited - 1)
            following = self._next()
        if following is not None:
            following.turn.release()
        job.await_turn()
        if job.left:
            raise _Cancelled
        job.begun = True
        if job.cancelled or self.closed:
            self._pass_on()
            raise _Cancelled

    def _next(self) -> _Job | None:
        """Who gets the turn that nobody has. With the lock held."""
        if self._busy or self._awaited or not self._line:
            return None
        self._busy = True
        self._free.clear()
        return self._line.popleft()

    def _pass_on(self) -> None:
        with self._lock:
            self._busy = False
            following = self._next()
            if following is None:
                self._free.set()
        if following is not None:
            following.turn.release()


class _Chooser(transformers.LogitsProcessor):  # type: ignore[misc]
    """Has the request's own plan choose each token, and leaves ``generate`` no other."""

    def __init__(self, runner: PlainRunner, job: _Job, size: int) -> None:
        self._runner, self._job = runner, job
        self._sampler = Sampler(size, 1, runner._model.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._sampler.prepare([self._job.plan])
        token = self._sampler.choose(scores) if self._sampler.active else scores.argmax(-1)
        self._runner.chosen(self._job, int(token))
        return torch.full_like(scores, -torch.inf).index_fill_(1, token, 0.0)


def _is_of_the_device(error: BaseException) -> bool:
    """Whether the device is in a state that fails every later run; a guess by name, as torch has no class for all."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
