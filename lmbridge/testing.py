"""For tests: an engine that does what it is told, and what every engine must do.

Rule: ``ScriptedEngine`` loads nothing and needs nothing; its cues may be given from any thread. ``EngineContract`` asks
nothing of an engine that a caller of the Bridge would not.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from lmbridge.bridge import Bridge
from lmbridge.engines.base import Engine, Sink
from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineError, LMBridgeError, RequestTimeoutError
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Overrides, Prompt, Request, Usage

Script = Callable[[Request], Sequence[str]]


def echo(request: Request) -> list[str]:
    """The default script: the words of the prompt, in pieces that join to it."""
    text = prompt_text(request.prompt)
    words = text.split(" ")
    return [word if place == 0 else f" {word}" for place, word in enumerate(words)]


def prompt_text(prompt: Prompt) -> str:
    """A prompt of any kind as one text: the last message of a conversation, or the token ids."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return str(last["content"]) if isinstance(last, dict) else " ".join(map(str, prompt))


class ScriptedEngine(Engine):
    """Answers each prompt with the pieces its script names, one piece per request and step.

    Steps follow each other as fast as the loop runs, or ``step_time`` seconds apart; with ``manual=True`` only
    ``step()`` makes one, which stands for time that passes on demand.

    Args:
        script: from a request to the pieces of its answer; each piece counts as one token.
        manual: make steps only on ``step()``.
        step_time: seconds between steps otherwise.
        start_error: raised by ``start``.
        start_gate: ``start`` waits until this event is set, without blocking the loop.
        max_batch_size: requests at once.
    """

    name = "scripted"
    supports = frozenset(GenerationConfig().__dict__)

    def __init__(
        self,
        script: Script = echo,
        *,
        manual: bool = False,
        step_time: float = 0.0,
        start_error: BaseException | None = None,
        start_gate: threading.Event | None = None,
        max_batch_size: int = 64,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.steps = 0  # written on the server thread, read by anyone, as are the next five
        self.tokens = 0
        self.started: list[str] = []
        self.aborted: list[str] = []
        self.closed = False
        self.threads: set[int] = set()
        self._script = script
        self._manual = manual
        self._step_time = step_time
        self._start_error = start_error
        self._start_gate = start_gate
        self._active: dict[str, _Work] = {}  # server thread only, as are the next four
        self._failing: dict[str, BaseException] = {}
        self._refusing: dict[str, BaseException] = {}
        self._forgetting: set[str] = set()
        self._stepping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()

    # --- cues, from any thread ---

    def step(self, count: int = 1) -> None:
        """Make ``count`` steps; returns when they are made."""
        done = threading.Event()

        def steps() -> None:
            for _ in range(count):
                self._step()
            done.set()

        self._on_loop(steps)
        done.wait(10)

    def crash(self, cause: BaseException) -> None:
        """Die: tell the server that this engine cannot go on."""
        self._on_loop(lambda: self.on_death(cause))

    def fail(self, text: str, error: BaseException) -> None:
        """Fail the request with this prompt at its next step; the others go on."""
        self._failing[text] = error

    def refuse(self, text: str, error: BaseException) -> None:
        """Raise ``error`` when the request with this prompt is added."""
        self._refusing[text] = error

    def forget(self, text: str) -> None:
        """Lose the request with this prompt at its next step: it gets no piece any more, nor a word on its abort."""
        self._forgetting.add(text)

    def block(self, until: threading.Event) -> None:
        """Block the loop itself, as an engine stuck in native code does, until the event is set."""
        self._on_loop(functools.partial(_wait_here, until))

    def wait_for(self, condition: Callable[[ScriptedEngine], bool], timeout: float = 10.0) -> None:
        """Block until ``condition(engine)`` holds.

        Raises:
            TimeoutError: it did not within ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout):
                raise TimeoutError(f"the engine did not come to the state waited for: {self.stats()}")

    @property
    def active(self) -> int:
        """How many requests it works on."""
        return len(self._active)

    # --- the engine contract ---

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.threads.add(threading.get_ident())
        while self._start_gate is not None and not self._start_gate.is_set():
            await asyncio.sleep(0.001)
        if self._start_error is not None:
            raise self._start_error

    def add_request(self, request: Request, sink: Sink) -> None:
        self.threads.add(threading.get_ident())
        text = prompt_text(request.prompt)
        if text in self._refusing:
            raise self._refusing.pop(text)
        self._active[request.id] = _Work(text, sink, list(self._script(request)), request.config.max_new_tokens)
        self._tell(lambda: self.started.append(request.id))
        self._step_later()

    def abort_request(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        work = self._active.pop(request_id, None)
        if work is not None:
            self._tell(lambda: self.aborted.append(request_id))
            work.finish("abort")

    def stats(self) -> dict[str, float]:
        return {
            "in_flight": float(len(self._active)),
            "steps": float(self.steps),
            "tokens": float(self.tokens),
            "max_batch_size": float(self.max_batch_size),
        }

    async def close(self) -> None:
        self._active.clear()
        self._tell(lambda: setattr(self, "closed", True))

    # --- stepping, on the server thread ---

    def _step(self) -> None:
        self._stepping = False
        self._tell(lambda: setattr(self, "steps", self.steps + 1))
        self.tokens += len(self._active)
        for request_id, work in list(self._active.items()):
            if work.text in self._forgetting:
                del self._active[request_id]
            elif work.text in self._failing:
                del self._active[request_id]
                error = EngineError(f"scripted failure of {work.text!r}")
                error.__cause__ = self._failing.pop(work.text)
                work.sink(Delta(error=error))
            elif work.advance():
                self._active.pop(request_id, None)
        self._tell(lambda: None)
        self._step_later()

    def _step_later(self) -> None:
        if self._active and not self._manual and not self._stepping and self._loop is not None:
            self._stepping = True
            if self._step_time:
                self._loop.call_later(self._step_time, self._step)
            else:
                self._loop.call_soon(self._step)

    def _on_loop(self, function: Callable[[], None]) -> None:
        self.wait_for(lambda engine: engine._loop is not None)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function)

    def _tell(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


class _Work:
    """One request inside the scripted engine."""

    def __init__(self, text: str, sink: Sink, pieces: list[str], limit: int) -> None:
        self.text = text
        self.sink = sink
        self._pieces = pieces
        self._limit = limit
        self._said = 0

    def advance(self) -> bool:
        """Say the next piece; whether that was the last one."""
        piece = self._pieces[self._said] if self._said < len(self._pieces) else ""
        self._said += 1
        complete = self._said >= len(self._pieces)
        if not complete and self._said < self._limit:
            self.sink(Delta(piece, [self._said]))
            return False
        self.finish("stop" if complete else "length", piece, [self._said])
        return True

    def finish(self, reason: FinishReason, text: str = "", token_ids: list[int] | None = None) -> None:
        usage = Usage(prompt_tokens=len(self.text.split()), completion_tokens=self._said)
        self.sink(Delta(text, token_ids or [], finish_reason=reason, usage=usage))


def _wait_here(event: threading.Event) -> None:
    event.wait(30)


class EngineContract:
    """What every engine must do, as tests of a Bridge over it. Subclass it in a pytest module and override ``engine``::

        class TestMyEngine(EngineContract):
            def engine(self):
                return MyEngine("a-model")

            prompts = ["a prompt", "another"]   # with different answers
            long_prompt = "one whose answer takes many steps"

    Attributes:
        prompts: prompts whose answers differ from each other.
        long_prompt: a prompt whose answer takes at least ten steps.
        poison: a prompt that the engine refuses, if there is one.
        patience: seconds after which a test is taken to hang.
        stall_timeout: seconds that none of the engine's steps takes, not even the first.
    """

    prompts: Sequence[str] = ()
    long_prompt = ""
    poison: Any = None
    patience = 60.0
    stall_timeout = 5.0

    def engine(self) -> Engine:
        """A new engine, not started."""
        raise NotImplementedError

    def alone(self, bridge: Bridge) -> list[str]:
        """Each prompt's answer, asked one after another."""
        return [bridge.infer(prompt, timeout=self.patience).text for prompt in self.prompts]

    def idle(self, bridge: Bridge) -> None:
        """Return when the engine works on nothing."""
        end = time.monotonic() + self.patience
        while bridge.requests() or bridge.stats()["in_flight"]:
            assert time.monotonic() < end, f"the engine still works: {bridge.stats()}"

    def _wrong_requests(self) -> Iterator[tuple[Any, GenerationConfig]]:
        if self.poison is not None:
            yield self.poison, GenerationConfig()
        for field, value in _GIVEN.items():
            if field not in self.engine().supports:
                yield self.prompts[0], GenerationConfig().merged(cast(Overrides, {field: value}))

    def test_answers_are_whole_and_in_order(self) -> None:
        """The deltas of a stream join to the answer that infer gives, and the facts of it are consistent."""
        with Bridge(self.engine) as bridge:
            for prompt, answer in zip(self.prompts, self.alone(bridge), strict=True):
                stream = bridge.stream(prompt, timeout=self.patience)
                assert "".join(delta.text for delta in stream) == answer == stream.response.text
                assert stream.response.finish_reason in ("stop", "length")
                assert stream.response.usage.completion_tokens >= len(stream.response.token_ids)
                assert stream.response.timings.first_token is not None

    def test_answers_do_not_mix(self) -> None:
        """Asked all at once by many threads, each prompt gets the answer it gets alone."""
        with Bridge(self.engine) as bridge, ThreadPoolExecutor(16) as pool:
            answers = dict(zip(self.prompts, self.alone(bridge), strict=True))
            asked = list(self.prompts) * 8
            texts = pool.map(lambda prompt: bridge.infer(prompt, timeout=self.patience).text, asked)
            assert [answers[prompt] for prompt in asked] == list(texts)
            self.idle(bridge)

    def test_abort_while_queued_working_and_finished(self) -> None:
        """An abort ends a request wherever it is, frees its place and harms nobody; a late one does nothing."""
        with Bridge(self.engine) as bridge:
            room = self.engine().max_batch_size
            streams = [bridge.stream(self.long_prompt) for _ in range(room + 2)]
            next(streams[0])
            for stream in reversed(streams):  # the queued ones first
                stream.close()
                assert stream.response.finish_reason == "abort"
            self.idle(bridge)
            finished = bridge.submit(self.prompts[0])
            assert finished.result(self.patience).text
            assert not finished.cancel()
            assert all(self.alone(bridge))

    def test_an_error_ends_one_request(self) -> None:
        """A request that cannot be honoured fails by itself, while another one runs on."""
        with Bridge(self.engine) as bridge:
            other = bridge.submit(self.long_prompt)
            for prompt, config in self._wrong_requests():
                failed = bridge.submit(prompt, config)
                assert isinstance(failed.exception(self.patience), LMBridgeError)
            assert other.result(self.patience).text

    def test_a_deadline_stops_the_engine(self) -> None:
        """A call whose time is up raises, and the engine does not go on with it."""
        with Bridge(self.engine) as bridge:
            stream = bridge.stream(self.long_prompt, timeout=self.patience)
            next(stream)
            stream.close()
            try:
                bridge.infer(self.long_prompt, timeout=0.001)
            except RequestTimeoutError as error:
                assert error.retryable
            else:
                raise AssertionError("an answer in a millisecond is no long answer; give another long_prompt")
            self.idle(bridge)

    def test_death_ends_what_runs_and_a_new_engine_follows(self) -> None:
        """When the engine says that it is dead, its requests end as retryable, and the next request is answered."""
        engines: list[Engine] = []

        def build() -> Engine:
            engines.append(self.engine())
            return engines[-1]

        with Bridge(build) as bridge:
            stream = bridge.stream(self.long_prompt)
            next(stream)
            bridge._host.server(True).run_soon(lambda: engines[0].on_death(RuntimeError("dead by contract")))
            try:
                for _ in stream:
                    pass
            except EngineDeadError as error:
                assert error.retryable
            else:
                raise AssertionError("the answer was complete before the engine died; give a longer long_prompt")
            assert bridge.infer(self.prompts[0], timeout=self.patience).text
            assert len(engines) == 2

    def test_a_forgotten_request_ends_alone(self) -> None:
        """A request of which the engine says no more ends as retryable and gives its place back, while others go on."""
        engines: list[Engine] = []

        def build() -> Engine:
            engines.append(_unheard(self.engine(), self.long_prompt))
            return engines[-1]

        with Bridge(build, stall_timeout=self.stall_timeout) as bridge:
            forgotten = bridge.submit(self.long_prompt)
            end = time.monotonic() + self.patience
            while not forgotten.done() or bridge.requests():  # the others keep the engine busy
                assert all(self.alone(bridge))
                assert time.monotonic() < end, f"the engine still works on it: {bridge.requests()}"
            error = forgotten.exception(0)
            assert isinstance(error, EngineError), repr(error)
            assert error.retryable
            assert "went on with others" in str(error)
            assert len(engines) == 1
            self.idle(bridge)

    def test_where_it_stands_is_told_to_anybody(self) -> None:
        """The message of a stall is written by another thread: where() answers it at any time of the engine's life."""
        engine = self.engine()
        places = [engine.where()]
        with Bridge(engine) as bridge:
            stream = bridge.stream(self.long_prompt, timeout=self.patience)
            next(stream)
            places.append(engine.where())
            stream.close()
        places.append(engine.where())
        assert all(isinstance(place, str) for place in places)

    def test_close_with_work_in_flight(self) -> None:
        """Closing ends what runs and leaves no thread behind."""
        before = set(threading.enumerate())
        with Bridge(self.engine) as bridge:
            stream, future = bridge.stream(self.long_prompt), bridge.submit(self.long_prompt)
            next(stream)
            bridge.close()
            assert isinstance(future.exception(self.patience), BridgeClosedError)
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("lmbridge"):
                thread.join(self.patience)
                assert not thread.is_alive()


def _unheard(engine: Engine, prompt: Prompt) -> Engine:
    """The engine, whose words on one prompt are lost from now on."""
    add = engine.add_request

    def add_request(request: Request, sink: Sink) -> None:
        add(request, (lambda delta: None) if request.prompt == prompt else sink)

    engine.add_request = add_request  # type: ignore[method-assign]
    return engine


_GIVEN: dict[str, object] = {
    "do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
    "random_seed": 1, "stop_words": ["x"], "stop_token_ids": [1], "ignore_eos": True, "skip_special_tokens": False,
    "logprobs": 1,
}  # fmt: skip
