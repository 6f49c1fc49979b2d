"""An engine that follows a script, for tests without a model.

Rule: loads nothing and needs nothing; cues may be given from any thread.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from lmbridge.engines.base import Engine, Sink
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineError
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Logprobs, Prompt, Request, Usage, prompt_text

Script = Callable[[Request], Sequence[str | Delta]]

SLICE = 0.5  # seconds between checks while ``start`` waits at its gate, so that closing ends the wait
_FIRST_WORD, _LIKELY = 1000, 2000  # token ids
STEP_PATIENCE = 10.0  # seconds that ``step`` waits for the loop


def echo(request: Request) -> list[str]:
    """The default script: the prompt itself, word by word."""
    return _words_of(prompt_text(request.prompt))


def _words_of(text: str) -> list[str]:
    """The words of a text; all but the first keep the space before them."""
    return [word if place == 0 else f" {word}" for place, word in enumerate(text.split(" "))]


class ScriptedEngine(Engine):
    """Answers each prompt with the pieces from its script, one piece per request and step.

    Steps follow each other as fast as the loop runs, or ``step_time`` seconds apart; with ``manual=True`` only
    ``step()`` makes one, so tests control time.

    Each word of a prompt is a token, with a fixed id from 1000 on; ``truncate_prompt_tokens`` keeps the last of them.
    ``prompt_logprobs`` are scripted: the n-th token after the first has -n, and the alternatives, with ids from 2000
    on, have -0.1, -0.2, and so on.

    Args:
        script: maps a request to the pieces of its answer; each piece counts as one token. A piece may be a Delta with
            reasoning and tool calls; an answer with calls ends with ``tool_calls``.
        manual: make steps only on ``step()``.
        step_time: seconds between steps otherwise.
        start_error: raised by ``start``.
        start_gate: ``start`` waits until this event is set, without blocking the loop.
        load_time: additional seconds that ``start`` takes.
        max_batch_size: the most requests at once.
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
        load_time: float = 0.0,
        max_batch_size: int = 64,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.steps = 0  # written on the server thread, read by anyone, like the next five; `wait_for` sees each change
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
        self._load_time = load_time
        self._failing: dict[str, BaseException] = {}  # by prompt; set by any thread in one atomic step, like the next
        self._refusing: dict[str, BaseException] = {}
        self._forgetting: set[str] = set()
        self._words: dict[str, int] = {}  # their token ids; server thread only
        self._active: dict[str, _Work] = {}  # server thread only, like the next three
        self._stepping = False
        self._stalled = False
        self._doorman = EngineThread("scripted start")
        self._loop: asyncio.AbstractEventLoop | None = None  # set once, by the server thread, under _changed
        self._changed = threading.Condition()

    # --- cues, from any thread ---

    def step(self, count: int = 1) -> None:
        """Make ``count`` steps; returns once they are done.

        Raises:
            TimeoutError: the loop did not make them within ``STEP_PATIENCE`` seconds.
        """
        done = threading.Event()

        def steps() -> None:
            for _ in range(count):
                self._step()
            done.set()

        self._on_loop(steps)
        if not done.wait(STEP_PATIENCE):
            raise TimeoutError(f"the loop made no steps for {STEP_PATIENCE:g} s: it is blocked, or has ended")

    def crash(self, cause: BaseException) -> None:
        """Die: report that this engine cannot go on."""
        self._on_loop(lambda: self.on_death(cause))

    def fail(self, text: str, error: BaseException) -> None:
        """Fail the request with this prompt at its next step; the others continue."""
        self._failing[text] = error

    def refuse(self, text: str, error: BaseException) -> None:
        """Raise ``error`` when the request with this prompt is added."""
        self._refusing[text] = error

    def forget(self, text: str) -> None:
        """Forget the request with this prompt at its next step: no more pieces, and no reply to its abort."""
        self._forgetting.add(text)

    def stall(self) -> None:
        """Go silent for good: no more steps and no replies to aborts, as if a kernel never returned."""
        self._on_loop(lambda: setattr(self, "_stalled", True))

    def block(self, until: threading.Event) -> None:
        """Block the loop itself, like an engine stuck in native code, until the event is set; 30 s at most."""
        self._on_loop(functools.partial(_wait_here, until))

    def wait_for(self, condition: Callable[[ScriptedEngine], bool], timeout: float = 10.0) -> None:
        """Block until ``condition(engine)`` holds.

        Raises:
            TimeoutError: it did not within ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout):
                raise TimeoutError(f"the engine did not reach the expected state: {self.stats()}")

    @property
    def active(self) -> int:
        """How many requests it is working on."""
        return len(self._active)

    # --- the engine contract ---

    async def start(self) -> None:
        self.threads.add(threading.get_ident())
        loop = asyncio.get_running_loop()
        self._tell(lambda: setattr(self, "_loop", loop))
        if self._start_gate is not None and not self._start_gate.is_set():
            await self._doorman.run(self._wait_at_gate, self._start_gate)
        await asyncio.sleep(self._load_time)
        if self._start_error is not None:
            raise self._start_error

    def add_request(self, request: Request, sink: Sink) -> None:
        self.threads.add(threading.get_ident())
        text = prompt_text(request.prompt)
        if text in self._refusing:
            raise self._refusing.pop(text)
        work = _Work(text, sink, list(self._script(request)), request.config.max_new_tokens)
        self._active[request.id] = work
        work.prompt = self._prompt(request)
        self._tell(lambda: self.started.append(request.id))
        self._step_later()

    def abort_request(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        if self._stalled:
            return
        work = self._active.pop(request_id, None)
        if work is not None:
            self._tell(lambda: self.aborted.append(request_id))
            work.finish("abort")

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The words of prompts seen so far; "" for other tokens."""
        words = {token: word for word, token in self._words.items()}
        return [words.get(token, "") for token in token_ids]

    def stats(self) -> dict[str, float]:
        return {
            "in_flight": float(len(self._active)),
            "steps": float(self.steps),
            "tokens": float(self.tokens),
            "max_batch_size": float(self.max_batch_size),
        }

    async def close(self) -> None:
        self._active.clear()
        self._doorman.close()
        self._tell(lambda: setattr(self, "closed", True))

    def _prompt(self, request: Request) -> tuple[list[int], list[Logprobs | None] | None] | None:
        """The prompt's tokens and their scripted log-probabilities, if requested."""
        config = request.config
        if config.prompt_logprobs is None and not config.return_prompt_token_ids:
            return None
        tokens = self._tokens(request.prompt)[-(config.truncate_prompt_tokens or 0) :]
        if config.prompt_logprobs is None:
            return tokens, None
        likely = {_LIKELY + place: -(place + 1) / 10 for place in range(config.prompt_logprobs)}
        return tokens, [{token: -float(place), **likely} if place else None for place, token in enumerate(tokens)]

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return [token for token in prompt if isinstance(token, int)]
        words = _words_of(prompt_text(prompt))
        return [self._words.setdefault(word, _FIRST_WORD + len(self._words)) for word in words]

    # --- stepping, on the server thread ---

    def _step(self) -> None:
        self._stepping = False
        if self._stalled:
            return
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

    def _wait_at_gate(self, gate: threading.Event) -> None:
        while not self.closed:
            if gate.wait(SLICE):
                return

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

    def __init__(self, text: str, sink: Sink, pieces: list[str | Delta], limit: int) -> None:
        self.text = text
        self.sink = sink
        self._pieces = pieces
        self._calls = any(piece.tool_calls for piece in pieces if isinstance(piece, Delta))
        self._limit = limit
        self._said = 0
        self.prompt: tuple[list[int], list[Logprobs | None] | None] | None = None  # sent with the first delta

    def advance(self) -> bool:
        """Send the next piece; returns whether it was the last."""
        given = self._pieces[self._said] if self._said < len(self._pieces) else ""
        self._said += 1
        piece = Delta(given, [self._said]) if isinstance(given, str) else replace(given, token_ids=[self._said])
        complete = self._said >= len(self._pieces)
        if not complete and self._said < self._limit:
            self.say(piece)
            return False
        self.finish(("tool_calls" if self._calls else "stop") if complete else "length", piece)
        return True

    def finish(self, reason: FinishReason, last: Delta | None = None) -> None:
        usage = Usage(prompt_tokens=len(self.text.split()), completion_tokens=self._said)
        self.say(replace(last or Delta(), finish_reason=reason, usage=usage))

    def say(self, delta: Delta) -> None:
        if self.prompt is not None:
            delta.prompt_token_ids, delta.prompt_logprobs = self.prompt
            self.prompt = None
        self.sink(delta)


def _wait_here(event: threading.Event) -> None:
    event.wait(30)
