"""What becomes of an engine whose library has changed under it: it says what is wrong, or runs in its other way.

Each test tampers with the installed transformers as a release of it might, and loads the same small model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from lmbridge import Bridge
from lmbridge.engines.transformers import library, proof
from lmbridge.errors import EngineStartError
from tests.engines.conftest import driven, generate

PROMPTS = [[5, 9, 200], list(range(1, 60))]


def runs(model: str, reference: Any, **options: Any) -> str:
    """The runner that the model is put on; its answers must be right."""

    async def scenario() -> str:
        async with driven(model, **options) as driver:
            answers = await driver.all([driver.add(prompt, max_new_tokens=8) for prompt in PROMPTS])
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert answer.token_ids == generate(reference, prompt, 8)
            return driver.engine.runner

    return asyncio.run(scenario())


def refusal(model: str, **options: Any) -> str:
    """What the error says with which the model is refused."""

    async def scenario() -> str:
        with pytest.raises(EngineStartError) as caught:
            async with driven(model, **options):
                pass
        return str(caught.value)

    return asyncio.run(scenario())


def test_as_it_is_the_model_runs_paged(llama: str, reference: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The tests below would show nothing, since models would run plain in any case."""
    with caplog.at_level(logging.INFO, "lmbridge"):
        assert runs(llama, reference) == "paged"
    assert "runs paged" in caplog.text
    assert runs(llama, reference, self_check=False) == "paged"


def test_a_renamed_call_leaves_the_engine_slower_not_dead(
    llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first command of a new user would end in an AttributeError of some thread."""
    monkeypatch.delattr(ContinuousBatchingManager, "register_result_handler")
    assert runs(llama, reference) == "plain"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lmbridge.loading"]
    assert "runs plain" in line
    assert "ContinuousBatchingManager.register_result_handler" in line


def test_a_renamed_call_is_named_where_paged_was_asked_for(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who relies on batching would get a service that is ten times slower, or an error that names no cause."""

    def prepare(self: Any, requests: Any, storage: Any) -> Any:
        raise AssertionError("never reached")

    monkeypatch.setattr(ContinuousBatchingLogitsProcessorList, "prepare_tensor_args", prepare)
    text = refusal(llama, runner="paged")
    assert "prepare_tensor_args(requests_in_batch)" in text
    assert library.PIP in text
    assert library.TRIED in text
    assert transformers.__version__ in text


def test_what_every_runner_needs_is_named_at_once(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``generate`` no request could be answered, and each would fail in its own way."""

    def generate(self: Any, prompts: Any) -> None:
        raise AssertionError("never reached")

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    assert "GenerationMixin.generate(generation_config)" in refusal(llama)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [RuntimeError, TypeError, SystemExit])
def test_a_thread_that_ends_at_its_first_step_is_noticed(
    llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: Any
) -> None:
    """The engine would be called ready, and callers wait for 300 seconds."""

    def end(self: Any, *args: Any, **kwargs: Any) -> None:
        raise kind("changed")

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_loop_body", end)
    assert runs(llama, reference) == "plain"
    assert "paged: " in refusal(llama, runner="paged")
    assert "Traceback" not in capfd.readouterr().err


def test_a_thread_that_hangs_at_its_first_step_is_noticed(
    llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading would never end."""
    monkeypatch.setattr(proof, "PATIENCE", 0.5)
    monkeypatch.setattr("lmbridge.engines.transformers.starting.CLOSE_TIMEOUT", 0.1)
    ended = threading.Event()
    body = ContinuousBatchingManager._generation_loop_body

    def hang(self: Any, *args: Any, **kwargs: Any) -> Any:
        ended.wait(100)
        return body(self, *args, **kwargs)

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_loop_body", hang)
    try:
        assert "paged: " in refusal(llama, runner="paged")
    finally:
        ended.set()


@pytest.mark.parametrize("part", ["the batch", "everything"])
def test_an_attention_that_returns_zeros_is_noticed(
    llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Everybody would get fluent nonsense from an engine that says it is ready."""
    functions = transformers.AttentionInterface._global_mapping
    attend = functions["sdpa"]

    def zeros(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        answer, weights = attend(module, query, key, value, mask, **kwargs)
        return (torch.zeros_like(answer) if part == "everything" or "cu_seq_lens_q" in kwargs else answer), weights

    monkeypatch.setitem(functions, "sdpa", zeros)
    if part == "the batch":
        assert runs(llama, reference, attn_implementation="sdpa") == "plain"
        assert "from the model's own" in refusal(llama, attn_implementation="sdpa", runner="paged")
    else:
        text = refusal(llama, attn_implementation="sdpa")
        assert "LlamaForCausalLM" in text
        assert transformers.__version__ in text
        assert "from the model's own" in text


def test_a_model_that_fails_in_the_batch_only_runs_plain(
    llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture that batching does not know would be refused, though the library runs it."""
    forward = transformers.LlamaModel.forward

    def picky(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cu_seq_lens_q" in kwargs:
            raise KeyError("cu_seq_lens_k")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", picky)
    assert runs(llama, reference) == "plain"


def test_the_bridge_says_what_is_wrong(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``health()`` would say ready over an engine that cannot answer, and a caller would run into a deadline."""

    def end(self: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError("unexpected keyword argument 'use_inference_mode'")

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_loop_body", end)
    bridge = Bridge(llama, runner="paged", timeout=60)
    try:
        with pytest.raises(EngineStartError, match="use_inference_mode"):
            bridge.infer("hello")
        assert bridge.health().state == "failed"
        assert "use_inference_mode" in bridge.health().reason
    finally:
        bridge.close()


def test_without_the_self_check_a_model_is_ready_at_once(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``self_check=False`` would cost what it is meant to spare."""

    async def scenario() -> None:
        async with driven(llama, self_check=False) as driver:
            assert driver.stat("steps") == 0
            assert (await driver.ask([1, 2], max_new_tokens=3)).reason == "length"

    asyncio.run(scenario())


def test_the_self_check_leaves_no_trace(llama: str) -> None:
    """The first user's figures would contain requests that nobody has sent."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            assert driver.stat("in_flight") == 0
            assert driver.stat("cache_free") == 1.0

    asyncio.run(scenario())
