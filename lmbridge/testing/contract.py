"""What every engine must do, as tests of a Bridge over it.

Rule: requires only what callers of the Bridge and the server require; uses only public names.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

from lmbridge.bridge import Bridge
from lmbridge.engines.base import Engine, Sink
from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineError, LMBridgeError, RequestTimeoutError
from lmbridge.messages import Delta, GenerationConfig, Overrides, Prompt, Request, Usage
from lmbridge.testing.witness import WitnessedEngines, has_ended


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
        workers: name prefixes of the engine's own threads, if the engine ends when one of them does.
        follows_forms: whether answers follow forms, as a model's do and a script's may not; if False, an engine that
            supports tools is not asked to call one.
        patience: seconds after which a test counts as hanging.
        stall_timeout: longer than any step of the engine, the first included, in seconds.
    """

    prompts: Sequence[str] = ()
    long_prompt = ""
    poison: Any = None
    workers: Sequence[str] = ()
    follows_forms = True
    patience = 60.0
    stall_timeout = 5.0

    def engine(self) -> Engine:
        """A new engine, not started."""
        raise NotImplementedError

    def alone(self, bridge: Bridge) -> list[str]:
        """The answers to the prompts, asked one by one."""
        return [bridge.infer(prompt, timeout=self.patience).text for prompt in self.prompts]

    def idle(self, bridge: Bridge, engines: WitnessedEngines) -> None:
        """Wait until the engine is idle; it must have ended every request it took."""
        assert engines.latest.in_flight(self.patience) == 0, f"the engine is still working: {bridge.stats()}"
        assert not bridge.requests()

    def _wrong_requests(self) -> Iterator[tuple[Any, GenerationConfig]]:
        if self.poison is not None:
            yield self.poison, GenerationConfig()
        for field, value in _GIVEN.items():
            if field not in self.engine().supports:
                yield self.prompts[0], GenerationConfig().merged(cast(Overrides, {field: value}))

    def test_answers_are_whole_and_in_order(self) -> None:
        """A stream's deltas join to the answer that infer gives, with consistent details."""
        with Bridge(self.engine) as bridge:
            for prompt, answer in zip(self.prompts, self.alone(bridge), strict=True):
                stream = bridge.stream(prompt, timeout=self.patience)
                assert "".join(delta.text for delta in stream) == answer == stream.response.text
                assert stream.response.finish_reason in ("stop", "length")
                assert stream.response.timings.first_token is not None

    def test_max_new_tokens_is_kept(self) -> None:
        """An engine that supports ``max_new_tokens`` stops there; a shorter answer is a prefix of a longer one."""
        if "max_new_tokens" not in self.engine().supports:  # it is refused: see test_an_error_ends_one_request
            raise unittest.SkipTest("it does not support max_new_tokens")
        with Bridge(self.engine) as bridge:
            shorter = bridge.infer(self.long_prompt, max_new_tokens=3, timeout=self.patience)
            longer = bridge.infer(self.long_prompt, max_new_tokens=8, timeout=self.patience)
        assert shorter.finish_reason == longer.finish_reason == "length"
        assert len(shorter.token_ids) <= 3
        assert len(shorter.text) < len(longer.text)
        assert longer.token_ids[: len(shorter.token_ids)] == shorter.token_ids

    def test_usage_counts_what_was_said(self) -> None:
        """An engine that counts tokens counts the prompt's and those it sent, with or without the end token."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            self.alone(bridge)
            if "max_new_tokens" in bridge.supports():
                bridge.infer(self.long_prompt, max_new_tokens=3, timeout=self.patience)
            for prompt in (self.prompts[0], f"{self.prompts[0]} {self.prompts[0]}"):
                bridge.infer(prompt, timeout=self.patience)
        prompts = [_checked_usage(deltas).prompt_tokens for deltas in engines.latest.said.values() if _usage(deltas)]
        if prompts:
            first, *_, again, twice = prompts
            assert 0 < first == again < twice, f"prompt_tokens: {first}, asked again {again}, twice as long {twice}"

    def test_answers_do_not_mix(self) -> None:
        """Asked by many threads at once, each prompt gets the same answer as alone, and none is lost."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge, ThreadPoolExecutor(16) as pool:
            answers = dict(zip(self.prompts, self.alone(bridge), strict=True))
            asked = list(self.prompts) * 8
            texts = pool.map(lambda prompt: bridge.infer(prompt, timeout=self.patience).text, asked)
            assert [answers[prompt] for prompt in asked] == list(texts)
            self.idle(bridge, engines)
        elsewhere = engines.latest.elsewhere
        assert not elsewhere, f"a sink was called by {elsewhere}; use loop.call_soon_threadsafe(sink, delta)"

    def test_twenty_streams_at_once_do_not_mix(self) -> None:
        """Twenty threads reading a stream each get the pieces of their own answer, in order."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge, ThreadPoolExecutor(20) as pool:
            answers = dict(zip(self.prompts, self.alone(bridge), strict=True))
            asked = list(itertools.islice(itertools.cycle(self.prompts), 20))
            start = threading.Barrier(20)

            def read(prompt: str) -> str:
                start.wait(self.patience)
                return "".join(delta.text for delta in bridge.stream(prompt, timeout=self.patience))

            assert [answers[prompt] for prompt in asked] == list(pool.map(read, asked))
            self.idle(bridge, engines)

    def test_a_tool_is_called(self) -> None:
        """An engine that supports tools calls the required one, with arguments that match its schema."""
        if not {"tools", "tool_choice"} <= self.engine().supports:
            raise unittest.SkipTest("it does not support tools")
        if not self.follows_forms:
            raise unittest.SkipTest("the answers here follow no forms")
        with Bridge(self.engine) as bridge:
            response = bridge.infer(self.prompts[0], tools=[_TOOL], tool_choice="required", timeout=self.patience)
        assert response.finish_reason == "tool_calls"
        for call in response.tool_calls:
            assert call.name == "paint", f"called an unknown function: {call.name}"
            assert call.parsed().get("colour") in _COLOURS, f"arguments do not match the schema: {call.arguments}"

    def test_abort_while_queued_working_and_finished(self) -> None:
        """An abort ends a request in any state, frees its place and affects no other; a late one does nothing."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            room = self.engine().max_batch_size
            streams = [bridge.stream(self.long_prompt) for _ in range(room + 2)]
            next(streams[0])
            for stream in reversed(streams):  # the queued ones first
                stream.close()
                assert stream.response.finish_reason == "abort"
            self.idle(bridge, engines)
            last = engines.latest.said[streams[0].request_id][-1]
            assert last.finish_reason == "abort", f"it was aborted but ended with {last.finish_reason or last.error!r}"
            finished = bridge.submit(self.prompts[0])
            assert finished.result(self.patience).text
            assert not finished.cancel()
            assert all(self.alone(bridge))

    def test_nothing_is_said_after_the_end(self) -> None:
        """A request gets exactly one last delta and none after it, however it ends."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            streams = [bridge.stream(self.long_prompt) for _ in range(2)]
            next(streams[0])
            streams[0].close()
            bridge.abort(streams[1].request_id)
            if self.poison is not None:
                bridge.submit(self.poison).exception(self.patience)
            self.alone(bridge)
        for request_id, deltas in engines.latest.said.items():  # the engine is closed by now
            heard = [(delta.text, delta.finish_reason, delta.error) for delta in deltas]
            assert has_ended(deltas[-1:]), f"{request_id} got a delta after its end: {heard[-3:]}"
            assert not has_ended(deltas[:-1]), f"{request_id} ended twice: {heard[-3:]}"

    def test_an_error_ends_one_request(self) -> None:
        """An invalid request fails alone, while another continues."""
        with Bridge(self.engine) as bridge:
            other = bridge.submit(self.long_prompt)
            for prompt, config in self._wrong_requests():
                failed = bridge.submit(prompt, config)
                assert isinstance(failed.exception(self.patience), LMBridgeError)
            assert other.result(self.patience).text

    def test_a_deadline_stops_the_engine(self) -> None:
        """A call past its deadline raises, and the engine stops working on it."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            stream = bridge.stream(self.long_prompt, timeout=self.patience)
            next(stream)
            stream.close()
            try:
                bridge.infer(self.long_prompt, timeout=0.001)
            except RequestTimeoutError as error:
                assert error.retryable
            else:
                raise AssertionError("the answer took under a millisecond; give a longer long_prompt")
            self.idle(bridge, engines)

    def test_death_ends_what_runs_and_a_new_engine_follows(self) -> None:
        """When the engine reports its death, its requests fail as retryable, and the next one is answered."""
        with Bridge(engines := WitnessedEngines(self.engine)) as bridge:
            stream = bridge.stream(self.long_prompt)
            next(stream)
            engine = engines.latest.engine
            engines.latest.on_loop(lambda: engine.on_death(RuntimeError("dead by contract")))
            try:
                for _ in stream:
                    pass
            except EngineDeadError as error:
                assert error.retryable
            else:
                raise AssertionError("the answer was complete before the engine died; give a longer long_prompt")
            assert bridge.infer(self.prompts[0], timeout=self.patience).text
            assert len(engines.witnesses) == 2

    def test_the_end_of_its_own_thread_is_told(self) -> None:
        """An engine whose own thread ends, for any reason, reports it at once and is replaced."""
        if not self.workers:
            raise unittest.SkipTest("``workers`` is empty")
        before = set(threading.enumerate())
        with _exits_unreported(), Bridge(self.engine, stall_timeout=None) as bridge:
            stream = bridge.stream(self.long_prompt, timeout=self.patience)
            next(stream)
            _end_threads([thread for thread in threading.enumerate() if thread not in before], self.workers)
            try:
                for _ in stream:
                    pass
            except EngineError as error:
                assert error.retryable
            except RequestTimeoutError:
                raise AssertionError("its thread has ended, but on_death was not called") from None
            else:
                raise AssertionError("the answer was complete before the thread ended; give a longer long_prompt")
            assert bridge.infer(self.prompts[0], timeout=self.patience).text

    def test_a_forgotten_request_ends_alone(self) -> None:
        """A request that the engine forgets fails as retryable and frees its place, while others continue."""
        engines = WitnessedEngines(self.engine)
        with Bridge(lambda: _unheard(engines(), self.long_prompt), stall_timeout=self.stall_timeout) as bridge:
            forgotten = bridge.submit(self.long_prompt)
            end = time.monotonic() + self.patience
            while not forgotten.done() or bridge.requests():  # the others keep the engine busy
                assert all(self.alone(bridge))
                assert time.monotonic() < end, f"the engine is still working on it: {bridge.requests()}"
            error = forgotten.exception(0)
            assert isinstance(error, EngineError), repr(error)
            assert error.retryable
            assert "worked on others" in str(error)
            assert len(engines.witnesses) == 1
            self.idle(bridge, engines)

    def test_where_it_stands_is_told_to_anybody(self) -> None:
        """Other threads report stalls: where() answers any thread at any time."""
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
        """Closing ends running requests and leaves no thread behind."""
        before = set(threading.enumerate())
        with Bridge(self.engine) as bridge:
            stream, future = bridge.stream(self.long_prompt), bridge.submit(self.long_prompt)
            next(stream)
            bridge.close()
            assert isinstance(future.exception(self.patience), BridgeClosedError)
        end, tick = time.monotonic() + self.patience, threading.Event()
        while left := [thread.name for thread in set(threading.enumerate()) - before if "lmbridge" in thread.name]:
            assert time.monotonic() < end, f"remaining threads: {left}"
            tick.wait(0.01)


def _unheard(engine: Engine, prompt: Prompt) -> Engine:
    """The engine, with all further deltas for one prompt lost."""
    add = engine.add_request

    def add_request(request: Request, sink: Sink) -> None:
        add(request, (lambda delta: None) if request.prompt == prompt else sink)

    engine.add_request = add_request  # type: ignore[method-assign]
    return engine


def _usage(deltas: list[Delta]) -> Usage | None:
    return next((delta.usage for delta in deltas if delta.usage is not None), None)


def _checked_usage(deltas: list[Delta]) -> Usage:
    """Check that usage counts the deltas' tokens, with or without the end token, which they omit."""
    said, usage = sum(len(delta.token_ids) for delta in deltas), _usage(deltas)
    assert usage is not None
    counted = usage.completion_tokens
    if said:  # the engine reports token ids
        most = said if any(delta.finish_reason == "length" for delta in deltas) else said + 1
        assert said <= counted <= most, f"completion_tokens is {counted} for {said} tokens"
    else:
        assert counted > 0 or not any(delta.text for delta in deltas), "completion_tokens is 0 although there is text"
    return usage


def _end_threads(threads: Sequence[threading.Thread], names: Sequence[str]) -> None:
    """End these threads as if they called ``sys.exit()``."""
    own = [thread for thread in threads if thread.name.startswith(tuple(names))]
    assert own, f"no thread named {names}; there are {[thread.name for thread in threads]}"
    for thread in own:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


@contextmanager
def _exits_unreported() -> Iterator[None]:
    """Silence pytest's report of a thread that exits, which Python itself does not report."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if args.exc_type is not SystemExit:
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


_COLOURS = ["red", "green", "blue"]
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints the wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": _COLOURS}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}

_GIVEN: dict[str, object] = {
    "do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
    "random_seed": 1, "stop_words": ["x"], "stop_token_ids": [1], "ignore_eos": True, "skip_special_tokens": False,
    "logprobs": 1, "max_new_tokens": 2, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {1: 1.0},
    "min_new_tokens": 1, "include_stop_str_in_output": True, "truncate_prompt_tokens": 5, "prompt_logprobs": 1,
    "return_prompt_token_ids": True, "response_format": {"type": "json_object"}, "grammar": {"regex": "a"},
    "tools": [_TOOL],
}  # fmt: skip
