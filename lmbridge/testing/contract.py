"""What every engine must do, as tests of a Bridge over it.

Rule: asks nothing of an engine that a caller of the Bridge would not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from lmbridge.bridge import Bridge
from lmbridge.engines.base import Engine, Sink
from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineError, LMBridgeError, RequestTimeoutError
from lmbridge.messages import GenerationConfig, Overrides, Prompt, Request


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
            bridge._server_thread.server(True).run_soon(lambda: engines[0].on_death(RuntimeError("dead by contract")))
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
