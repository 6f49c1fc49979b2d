"""The contract between the engine and the two ways of running a model.

Rule: a runner is built, started and closed on the engine's worker thread; what else the engine asks of it is quick and
comes from the server thread. It generates on threads of its own, which tell of their work by hops to the server's loop;
the ``Listener`` is called on the server thread only.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lmbridge.engines.base import Party
from lmbridge.engines.standing import where_is
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.plan import Plan

EXIT_GRACE = 5.0
"""Seconds that the end of the process waits for a model that is loading, or for a step under way."""
TINY_MODEL = 4_000_000
"""Parameters below which a second thread costs more than it does: waiting for each other takes longer than the work."""
NO_LIMIT = 1 << 20
"""Tokens of prompt and answer together for a model that states no limit of its own."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a runner reports to, on the server thread.

    Attributes:
        on_tokens: called with a request's key, its tokens so far, and whether the last one ends it.
        on_failure: called with a request's key and its error; the others continue.
        on_end: called with the reason when the runner cannot go on.
    """

    on_tokens: Callable[[str, Sequence[int], bool], None]
    on_failure: Callable[[str, BaseException], None]
    on_end: Callable[[BaseException], None]


class Runner(ABC):
    """A model that generates for many requests.

    Attributes:
        name: the runner's name for users.
        room: the most tokens, prompt and answer together, that one request may have.
        capacity: how many tokens the cache holds for all requests together.
        page: tokens per page of the cache.
    """

    name: ClassVar[str]
    room: int
    capacity: int
    page: int = 1
    _witness: Witness

    def take_turns(self, party: Party) -> None:
        """Run the model only in the engine's turns on its device. Called before ``start``."""
        self._witness.party = party

    @abstractmethod
    def start(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        """Start taking requests; reports to ``listener`` on ``loop``. Must be called from a daemon thread."""

    def proved(self) -> None:  # noqa: B027 - there may be nothing to do
        """Called once the self-check has passed or is disabled: further requests are users'."""

    @abstractmethod
    def add(self, key: str, prompt: list[int], budget: int, stop_ids: Sequence[int], plan: Plan) -> None:
        """Begin a request of at most ``budget`` new tokens."""

    @abstractmethod
    def cancel(self, key: str) -> None:
        """Free what the request holds, within two more steps. Nothing need be reported."""

    def waits(self, key: str) -> bool:
        """Whether the request is queued inside, where others may legitimately run for long before it."""
        return False

    @abstractmethod
    def footprint(self) -> int:
        """Bytes that the model and its cache hold."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Runs of the model so far."""

    @abstractmethod
    def where(self) -> str:
        """What the generation thread is executing, briefly. Any thread."""

    @abstractmethod
    def halt(self, timeout: float) -> bool:
        """Stop generating and reporting; False if a step does not end within ``timeout`` seconds."""

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """Halt and release the model; False if a step does not end within ``timeout`` seconds."""


class Witness:
    """Watches the model's runs by hooks that torch documents: how many there were, who is in one, how one failed.

    Each run is a turn on the device; whoever waits for that is in the run already, so that nobody takes it for idle.

    Written by generation threads, read by anyone; each attribute is set in one step.

    Attributes:
        party: whose turns they are; None where nobody else works on the device.
    """

    def __init__(self, model: Any) -> None:
        self.steps = 0
        self.party: Party | None = None
        self._turn: contextlib.AbstractContextManager[object] | None = None  # generation threads only, one at a time
        self._device = model.device
        self.error: BaseException | None = None  # what the last run that failed has raised
        self._inside: tuple[int, float] | None = None  # the thread that is in a run, and since when
        self._hooks = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self.end_turn()  # of a run that hangs, whose last hook will not be called
        self.error = None

    @property
    def inside(self) -> bool:
        """Whether a run is under way."""
        return self._inside is not None

    def where(self) -> str:
        """Which step is under way since when, and where in the code; "" between steps."""
        inside = self._inside
        if inside is None:
            return ""
        thread, since = inside
        return f"step {self.steps} began {time.monotonic() - since:.1f} s ago and is in {where_is(thread)}"

    def end_turn(self) -> None:
        """The run is over, or what it had raised has passed torch's hooks by. A second time does nothing."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.__exit__(None, None, None)

    def _enter(self, model: Any, inputs: Any) -> None:
        self.steps += 1
        self._inside = threading.get_ident(), time.monotonic()
        party = self.party
        if party is not None:
            self._turn = turn = party.turn()
            turn.__enter__()

    def _leave(self, model: Any, inputs: Any, output: Any) -> None:
        if self._turn is not None:
            try:
                # A GPU computes on after the call has returned, which is of interest to the others only.
                if self._device.type == "cuda" and getattr(self.party, "contended", True):
                    torch.cuda.current_stream(self._device).synchronize()
            finally:
                self.end_turn()
        self._inside = None
        raised = sys.exc_info()[1]  # torch calls the hook while it handles what the run raised
        if raised is not None:
            self.error = raised


# ------------------------------------------------------------------------------------------- what both runners work out


def context_of(model: Any, options: ModelOptions) -> int | None:
    """The most tokens of prompt and answer that model and options allow; None where neither states a limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    stated = next(
        (limit for name in names if isinstance(limit := getattr(config, name, None), int) and limit > 0), None
    )
    rope = getattr(config, "rope_parameters", None) or {}
    if stated is not None and rope.get("rope_type") in ("linear", "dynamic"):
        stated = int(
            stated * rope.get("factor", 1.0)
        )  # these state what the model was trained on, the others the whole
    return min((limit for limit in (stated, options.max_context) if limit), default=None)


def rope_kind(model: Any) -> str:
    """How positions are scaled: ``default``, ``dynamic``, ``longrope`` …; the worst of a model with several."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    return next((kind for kind in ("dynamic", "longrope") if kind in kinds), "default")


def thread_count(model: Any, options: ModelOptions) -> int | None:
    """How many threads torch should use in a step; None for its own choice."""
    tiny = model.device.type == "cpu" and model.num_parameters() < TINY_MODEL
    return options.threads or (1 if tiny else None)


def use_threads(count: int | None) -> None:
    """Have torch use so many threads for what the calling thread computes.

    torch keeps the number for each thread, but takes the last one set for threads to come, hence one sets it back.
    """
    if count is not None:
        with _setting:
            _use_threads(count)


_setting = threading.Lock()
"""Two at once would take the number that the other has set for a moment for the usual one."""


def _use_threads(count: int) -> None:
    usual = torch.get_num_threads()
    if count != usual:
        torch.set_num_threads(count)
        restorer = threading.Thread(target=torch.set_num_threads, args=(usual,), daemon=True)
        try:
            restorer.start()
            restorer.join()
        except RuntimeError:  # the system gives no more threads: then this one computes with the usual number
            torch.set_num_threads(usual)


# --------------------------------------------------------------------------------------------------- the process's end

_generating: set[Runner] = set()  # single operations on a set are atomic; so too below
_loading: set[threading.Event] = set()
_leaving = threading.Event()
os.register_at_fork(after_in_child=_generating.clear)  # nothing of them runs there
os.register_at_fork(after_in_child=_loading.clear)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While a model loads, the end of the process waits for it."""
    loaded = threading.Event()
    _loading.add(loaded)
    try:
        yield
    finally:
        _loading.discard(loaded)
        loaded.set()


def generating(runner: Runner) -> None:
    """The runner is about to compute in daemon threads, which must be still before the interpreter goes.

    Raises:
        RuntimeError: the interpreter is ending; nothing may begin to compute.
    """
    if _leaving.is_set():
        raise RuntimeError("The interpreter is ending.")
    _generating.add(runner)


def still(runner: Runner) -> None:
    """The runner has stopped computing."""
    _generating.discard(runner)


@atexit.register
def _end_threads() -> None:
    """An interpreter that ends while a daemon thread is inside torch aborts the process (before Python 3.14).

    It runs before a bridge's own end, since this module is imported later, and hence is quiet about requests in flight.
    """
    _leaving.set()
    end = time.monotonic() + EXIT_GRACE
    for loaded in list(_loading):
        loaded.wait(max(0.0, end - time.monotonic()))
    for runner in list(_generating):
        runner.halt(EXIT_GRACE)
