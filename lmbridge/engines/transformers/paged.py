"""The paged runner: transformers' own continuous batching, one packed batch of all requests in each step.

Rule: of transformers only calls that its documentation knows; what is not documented stands in ``processor`` and
``attention``. Threads as ``runner`` says; the outputs come from the manager's own generation thread, by one hop to the
loop for each step.

CUDA graphs are off unless asked for, asynchronous batching always: it prepares a step before the token of the last one
is known, which a repetition penalty needs.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from lmbridge.engines.transformers import attention, library, processor
from lmbridge.engines.transformers.memory import cached_per_token
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
from lmbridge.engines.transformers.sizes import SAFETY, CacheSizes

WATCH = 0.25
"""Seconds between two looks at whether the generation thread lives."""
CLOSE_WATCH = 0.02
"""The same once a request has failed, which is how the end of the thread begins to show."""
ALONE_AFTER = 0.5
"""Seconds after which a request that failed is taken to have failed alone, the thread being alive."""
WEDGED = 20
"""Looks in a row that find requests and no step, after which none is expected any more."""
END = 0
"""The token that ends a request from outside; any will do, since nobody is shown it."""


class PagedRunner(Runner):
    """A model with its manager."""

    name = "paged"

    def __init__(self, model: Any, options: ModelOptions, *, own_attention: bool = False) -> None:
        """On the worker thread.

        Args:
            own_attention: attend by ``attention`` rather than as transformers does.

        Raises:
            EngineStartError: transformers keeps its logits processors elsewhere.
            Exception: what transformers raises for a model it cannot batch, or when there is too little memory.
        """
        self._model = model
        self._size = _vocabulary(model)
        self._sampler = Sampler(self._size, options.max_batch_size, model.device, static=options.cuda_graphs)
        self._threads = thread_count(model, options)
        self._plans: dict[str, Plan] = {}  # of the requests inside, by key; server thread only, as the next
        self._idle_looks = 0  # how often in a row there were requests and no step
        self._seen = 0  # steps at the last look
        self._failed: deque[tuple[float, str, str]] = deque()  # when to believe it, key, why
        self._refused: float | None = None  # since when the manager takes no requests
        self._timer: asyncio.TimerHandle | None = None
        sizes = CacheSizes(model, options)
        self.page, self._chunk = sizes.page, sizes.chunk
        self._reader = Reader(model, library.attention_of(model))
        self._manager = self._build(sizes, options, own_attention)
        self.room, self.capacity = sizes.room, sizes.blocks * sizes.page
        self._witness = Witness(model)
        self._halted = False

    def start(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        """The generation thread is a daemon because the caller is: no model may block process exit."""
        if not threading.current_thread().daemon:
            raise RuntimeError("The generation thread must be started from a daemon thread, so that it becomes one.")
        self._loop, self._listener = loop, listener
        generating(self)
        with torch.inference_mode():  # the generation thread inherits the mode, which saves a few per cent
            self._manager.start()
        loop.call_soon_threadsafe(self._look)

    def add(self, key: str, prompt: list[int], budget: int, stop_ids: Sequence[int], plan: Plan) -> None:
        self._manager.register_result_handler(key, self._deliver)
        self._plans[key] = plan
        added = self._manager.add_request(
            prompt,
            request_id=key,
            max_new_tokens=budget,
            streaming=True,
            eos_token_id=list(stop_ids) or -1,
            plan=plan,
        )
        if added is None and self._refused is None:  # its thread is ending, and will soon report why
            self._refused = time.monotonic()
            self._loop.call_soon(self._look)

    def cancel(self, key: str) -> None:
        """One that has begun is ended by its own next token, others through the manager.

        Of a request that it was told to cancel, the manager never lets go of the handler; and if others had lost their
        cache to it, it begins none of them again. Both happen only at a request's end.
        """
        plan = self._plans.get(key)
        if plan is not None and plan.steps:
            plan.end = END
        else:
            self._plans.pop(key, None)
            self._manager.cancel_request(key)

    def waits(self, key: str) -> bool:
        """While the prompts of earlier ones are read, or where the cache has no room. The scheduler takes requests in
        the order in which they come.
        """
        plan = self._plans.get(key)
        if plan is None:
            return False
        held = sum(-(-(len(other.prompt) + other.position) // self.page) for other in self._plans.values())
        if held * self.page > (1 - SAFETY) * self.capacity:
            return True
        earlier = itertools.takewhile(lambda other: other is not plan, self._plans.values())
        return not plan.position and any(not other.position for other in earlier)

    def footprint(self) -> int:
        per_token = cached_per_token(self._model.config.get_text_config(), self._model.dtype.itemsize)
        return int(self._model.get_memory_footprint()) + self.capacity * per_token

    @property
    def steps(self) -> int:
        return self._sampler.steps

    def where(self) -> str:
        if not self._manager.is_running():
            return "the generation thread of transformers has ended"
        return self._witness.where() or f"step {self.steps} has ended and no other has begun"

    def halt(self, timeout: float) -> bool:
        self._halted = True
        manager = self._manager
        if manager is not None and manager.is_running():
            with library.quiet():  # requests are ended elsewhere, or nobody is waiting
                manager.stop(block=True, timeout=timeout, hard_stop=True)
        ended = manager is None or not manager.is_running()
        if ended:
            still(self)
        return ended

    def close(self, timeout: float) -> bool:
        ended = self.halt(timeout)
        self._witness.close()
        self._plans.clear()
        if ended:
            self._forget()
        else:
            threading.Thread(target=self._let_go, name="lmbridge late end", daemon=True).start()
        return ended

    def _let_go(self) -> None:
        """On a separate thread: once the hanging step is over, or never."""
        while self._manager.is_running():
            time.sleep(WATCH)
        still(self)
        self._forget()

    def _forget(self) -> None:
        self._manager = self._model = None
        self._reader.close()

    # ---------------------------------------------------------------------------------------------------- server thread

    def _deliver(self, output: Any) -> None:
        """Deliver one request's output of one step."""
        if self._halted:
            return
        key: str = output.request_id
        finished: bool = output.is_finished()
        plan = self._plans.get(key)
        if output.error is not None:
            self._failed.append((time.monotonic() + ALONE_AFTER, key, output.error))
            self._look()
        elif plan is None:
            if not finished:
                # The manager empties one queue of requests and then one of cancellations. A cancellation put between
                # may be read before its request, which then shows up once more.
                self._manager.cancel_request(key)
        else:
            if finished:
                del self._plans[key]
            if plan.end is None:
                self._listener.on_tokens(key, output.generated_tokens, finished)

    def _look(self) -> None:
        """Check whether the generation thread is alive, and whether failed requests failed alone."""
        if self._timer is not None:
            self._timer.cancel()
        if self._halted:
            return
        now = time.monotonic()
        refuses = self._refused is not None and now - self._refused > ALONE_AFTER
        if refuses or not self._manager.is_running():
            self._listener.on_end(self._cause())
            return
        while self._failed and self._failed[0][0] <= now:
            _, key, why = self._failed.popleft()
            if self._plans.pop(key, None) is not None:
                self._listener.on_failure(key, RuntimeError(why))
        self._look_for_steps()
        close = self._failed or self._refused is not None
        self._timer = self._loop.call_later(CLOSE_WATCH if close else WATCH, self._look)

    def _look_for_steps(self) -> None:
        """A scheduler that runs nothing though there are requests is dead too, however alive its thread.

        Looks are counted, not seconds: a process that was stopped goes on with the same engine.
        """
        stands = bool(self._plans) and self.steps == self._seen and not self._witness.inside
        self._idle_looks = self._idle_looks + 1 if stands else 0
        self._seen = self.steps
        if self._idle_looks > WEDGED:
            why = f"transformers schedules nothing although it has {len(self._plans)} requests"
            self._listener.on_end(RuntimeError(why))

    def _cause(self) -> BaseException:
        """What ended the thread: the model's error if it raised one, else what transformers recorded."""
        why = self._failed[0][2] if self._failed else None
        error = self._witness.error
        if error is not None and (why is None or str(error) == why):
            return error
        running = "takes no more requests" if self._manager.is_running() else "ended without an error"
        return RuntimeError(why or f"The generation thread of transformers {running}.")

    # ---------------------------------------------------------------------------------------------------- worker thread

    def _build(self, sizes: CacheSizes, options: ModelOptions, own_attention: bool) -> Any:
        while True:
            try:
                return self._manager_of(sizes.config(options), own_attention)
            except MemoryError:  # what a step needs besides is transformers' own estimate
                if options.num_blocks is not None or not sizes.shrink():
                    raise
                if own_attention:  # a manager is made for what transformers has itself only
                    self._model.set_attn_implementation("sdpa")

    def _manager_of(self, config: Any, own_attention: bool) -> Any:
        # Neutral: what the model's author recommends for sampling is for the plan of each request.
        neutral = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        with torch.inference_mode():
            manager = self._model.init_continuous_batching(generation_config=neutral, continuous_batching_config=config)
            if own_attention:
                attention.install(self._model)
            processor.install(manager, self._sampler, self._enter, self._read)
            manager.warmup()  # makes the cache here rather than in its thread, so that a lack of memory is told at once
        return manager

    def _enter(self) -> None:
        """On the generation thread, before its first step."""
        threading.current_thread().name = "lmbridge generation"
        use_threads(self._threads)

    def _read(self, plan: Plan, rest: bool) -> None:
        """On the generation thread: as much of the plan's prompt as a step reads, or the rest of it."""
        if plan.reading is None or not plan.reading.unread(plan.prompt):
            return
        try:
            self._reader.read(plan.reading, plan.prompt, None if rest else self._chunk)
        except Exception as error:  # the others' step need not fail for it
            plan.reading.fail(error)


def unfit(model: Any, options: ModelOptions) -> str:
    """Why the packed batch cannot be right for the model, though short prompts would not show it; "" if it can."""
    config = model.config.get_text_config()
    rope = rope_kind(model)
    if rope in ("dynamic", "longrope"):
        short = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        if (context_of(model, options) or NO_LIMIT) > short:
            return f"its {rope} positions would follow the longest request in the batch (max_context={short} avoids it)"
    flash = (options.attn_implementation or "").startswith("flash")
    if getattr(config, "attn_logit_softcapping", None) and not flash:
        return "transformers' batching drops its soft cap, but where a flash attn_implementation is asked for"
    return ""


def _vocabulary(model: Any) -> int:
    size: int = model.get_output_embeddings().weight.shape[0]
    return size
