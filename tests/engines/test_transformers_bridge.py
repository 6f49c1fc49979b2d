"""The transformers engine's own death and its forgetfulness, as callers of a bridge meet them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.engines.transformers import TransformersEngine
from lmbridge.errors import EngineDeadError, EngineError, InvalidRequestError
from lmbridge.messages import Response
from tests.conftest import until

PATIENCE = 60.0


class Rebuilt:
    """A bridge that remembers the engines it has built."""

    def __init__(self, model: str, **options: Any) -> None:
        self.engines: list[TransformersEngine] = []

        def build() -> TransformersEngine:
            self.engines.append(TransformersEngine(model, device="cpu", max_context=512))
            return self.engines[-1]

        self.bridge = Bridge(build, timeout=PATIENCE, **options).start()

    @property
    def runner(self) -> Any:
        core = self.engines[-1]._core
        assert core is not None
        return core.runner


@pytest.fixture
def rebuilt(llama: str) -> Iterator[Rebuilt]:
    made = Rebuilt(llama)
    yield made
    made.bridge.close(drain=False)


def test_the_end_of_the_thread_reaches_callers_and_the_engine_is_rebuilt(rebuilt: Rebuilt) -> None:
    """Callers would wait for the watchdog's 300 seconds, and be told that there was no progress."""
    bridge = rebuilt.bridge
    stream = bridge.stream([1, 2], max_new_tokens=500)
    next(stream)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TypeError("unexpected keyword argument 'use_inference_mode'")

    rebuilt.runner._model.forward = fail
    with pytest.raises(EngineDeadError, match="use_inference_mode") as caught:
        for _ in stream:
            pass
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, TypeError)
    assert bridge.infer([3, 4], max_new_tokens=3).finish_reason == "length"  # by the next engine
    assert (len(rebuilt.engines), bridge.health().restarts, bridge.health().state) == (2, 1, "ready")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_of_a_thread_that_ends_while_nobody_asks(rebuilt: Rebuilt) -> None:
    """health() would say ready over a dead thread until somebody's request is lost in it."""

    def leave() -> None:
        raise SystemExit("a library has called exit()")

    rebuilt.runner._manager.batch_processor.prepare_next_batch = leave
    until(lambda: rebuilt.bridge.health().restarts == 1)
    assert rebuilt.bridge.infer([3, 4], max_new_tokens=3).finish_reason == "length"


def test_a_request_that_transformers_forgets_fails_alone(llama: str) -> None:
    """One caller would wait for ever beside others who are served."""
    made = Rebuilt(llama, stall_timeout=1.0)
    bridge = made.bridge
    try:
        manager = made.runner._manager
        register = manager.register_result_handler
        manager.register_result_handler = lambda *args: None  # its outputs go where nobody looks
        lost = bridge.submit([1, 2], max_new_tokens=3)
        until(lambda: [request.state for request in bridge.requests()] == ["running"])
        manager.register_result_handler = register
        answers: list[Response] = []
        while not lost.done():  # others keep the engine stepping
            answers.append(bridge.infer([len(answers) % 200, 7], max_new_tokens=20))
        with pytest.raises(EngineError, match="no progress on this request") as caught:
            lost.result()
        assert caught.value.retryable
        assert {answer.finish_reason for answer in answers} == {"length"}
        assert bridge.health().restarts == 0
    finally:
        bridge.close(drain=False)


def test_a_token_that_the_model_does_not_have_costs_its_caller_only(llama: str, tmp_path: Any) -> None:
    """A token that was added to the tokenizer alone would kill the engine for everybody, for good after three times."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    more = [f"[added {number}]" for number in range(10)]  # the model has rows for seven
    tokenizer.add_tokens(more, special_tokens=True)
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with Bridge(str(tmp_path), device="cpu", timeout=PATIENCE) as bridge:
        neighbour = bridge.submit([5, 6], max_new_tokens=200)
        for _ in range(4):
            with pytest.raises(InvalidRequestError, match=r"\[added 9\]"):
                bridge.infer("what is [added 9] ?", max_new_tokens=4)
        assert neighbour.result().usage.completion_tokens == 200
        assert (bridge.health().state, bridge.health().restarts) == ("ready", 0)
        assert bridge.infer("what is [added 1] ?", max_new_tokens=4).finish_reason == "length"


def test_models_may_be_loaded_at_the_same_time() -> None:
    """An app with two models, both asked for at once, would be told that their files are incomplete."""
    bridges = [Bridge("demo", timeout=PATIENCE) for _ in range(3)]
    try:
        futures = [bridge.submit("What is the capital of France?", max_new_tokens=8) for bridge in bridges]
        assert ["Paris" in future.result().text for future in futures] == [True] * 3
    finally:
        for bridge in bridges:
            bridge.close(drain=False)


@pytest.mark.parametrize("extreme", [{"repetition_penalty": 1e39}, {"temperature": 1e308}, {"temperature": 1e-300}])
def test_no_setting_costs_others_their_engine(rebuilt: Rebuilt, extreme: dict[str, Any]) -> None:
    """One caller's odd settings would kill the engine for everybody, for good after three times."""
    neighbour = rebuilt.bridge.submit([5, 6], max_new_tokens=200, ignore_eos=True)
    answer = rebuilt.bridge.infer([1, 2], max_new_tokens=5, ignore_eos=True, random_seed=1, **extreme)
    assert answer.usage.completion_tokens == 5
    assert neighbour.result().usage.completion_tokens == 200
    assert rebuilt.bridge.health().restarts == 0


@pytest.mark.parametrize("options", [{"max_chunk_size": 8, "max_batch_size": 8}, {"num_blocks": 20, "page_size": 16}])
def test_who_waits_for_others_is_not_forgotten(llama: str, options: dict[str, Any]) -> None:
    """Callers behind others' long prompts, or a full cache, would be failed as forgotten though their turn comes."""

    def pause(*args: Any) -> None:
        threading.Event().wait(0.01)

    class Slow(TransformersEngine):
        async def start(self) -> None:
            await super().start()
            assert self._core is not None
            model: Any = self._core.runner._model  # type: ignore[attr-defined]
            model.register_forward_pre_hook(pause)

    bridge = Bridge(lambda: Slow(llama, device="cpu", max_context=512, **options), timeout=PATIENCE, stall_timeout=0.5)
    try:
        futures = [bridge.submit([number] * 200, max_new_tokens=40, ignore_eos=True) for number in range(1, 5)]
        assert [future.result().usage.completion_tokens for future in futures] == [40] * 4
    finally:
        bridge.close(drain=False)
