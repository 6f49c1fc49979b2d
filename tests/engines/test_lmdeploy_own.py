"""What a request may ask of LMDeploy alone: it reaches LMDeploy, and what LMDeploy tells beside tokens comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from lmbridge import Bridge
from lmbridge.engines.lmdeploy.own import OWN_FIELDS, LMDeployRequestConfig
from lmbridge.engines.lmdeploy.told import Told
from lmbridge.errors import InvalidRequestError, PromptTooLongError, UnsupportedOptionError
from lmbridge.messages import Delta, GenerationConfig, Prompt
from lmbridge.testing import ScriptedEngine
from tests.engines.conftest import BYTES, EOS, Answer
from tests.engines.lmdeploy_scripted import Cues, Driver, driven, scripted_gpu

Scenario = Callable[[Driver, Cues], Coroutine[Any, Any, None]]


def run(model: str, scenario: Scenario) -> None:
    async def whole() -> None:
        with scripted_gpu() as cues:
            async with driven(model, log_level="CRITICAL") as driver:
                await scenario(driver, cues)

    asyncio.run(whole())


def add(driver: Driver, prompt: Prompt = "abc", **fields: Any) -> Answer:
    request = driver.request(prompt)
    request.config = LMDeployRequestConfig(**fields).merged({})
    answer = Answer(request)
    driver.engine.check(request)
    driver.engine.add_request(request, answer.sink)
    return answer


async def ask(driver: Driver, prompt: Prompt = "abc", **fields: Any) -> Answer:
    return await add(driver, prompt, **fields).wait()


def test_what_must_not_come(llama: str) -> None:
    """A word that must not come would come."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        assert (await ask(driver, bad_words=["b"])).text == "aac"
        assert (await ask(driver, bad_token_ids=[BYTES["c"]])).text == "aba"

    run(llama, scenario)


def test_arguments_of_preprocessing(llama: str) -> None:
    """How images are read, and a structural tag, would be taken and have no effect."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        seen: list[dict[str, Any]] = []
        core = driver.engine._core
        preprocess = core.preprocess

        async def recorded(**arguments: Any) -> Any:
            seen.append(arguments)
            return await preprocess(**{**arguments, "gen_config": None})  # the form itself is no matter here

        core.preprocess = recorded
        media = {"video": {"num_frames": 4}}
        tag = {"type": "structural_tag", "format": {"type": "any_text"}}
        await ask(driver, media_io_kwargs=media, mm_processor_kwargs={"min_pixels": 9}, structural_tag=tag)
        assert (seen[0]["media_io_kwargs"], seen[0]["mm_processor_kwargs"]) == (media, {"min_pixels": 9})
        assert seen[0]["gen_config"].response_format == tag
        await ask(driver)
        assert not {"media_io_kwargs", "mm_processor_kwargs", "adapter_name"} & set(seen[1])

    run(llama, scenario)


def test_an_adapter_that_was_not_loaded_is_refused(llama: str) -> None:
    """LMDeploy looks for it in its loop, which would end for everyone."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        other = driver.add("abc" * 20)
        refused = await ask(driver, adapter_name="none such")
        assert isinstance(refused.error, InvalidRequestError)
        assert refused.error.param == "adapter_name"
        assert (await other.wait()).text == "abc" * 20

    run(llama, scenario)


def test_the_ending_token(llama: str) -> None:
    """Who asks for the token that ended the answer would not get it, or get it twice."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        kept = await ask(driver, keep_ending_token=True, logprobs=1)
        assert (kept.text, kept.token_ids[-1], len(kept.logprobs)) == ("abc<eos>", EOS, 4)
        cut = await ask(driver, keep_ending_token=True, max_new_tokens=2)
        assert (cut.text, cut.reason) == ("ab", "length")

    run(llama, scenario)


def test_the_prompts_tokens_are_told_first(llama: str) -> None:
    """A reader would not know how long the prompt was before the answer has ended."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = await driver.ask("abc", return_prompt_token_ids=True)
        assert answer.deltas[0].prompt_token_ids == [BYTES[letter] for letter in "abc"]
        assert all(delta.prompt_token_ids is None for delta in answer.deltas[1:])
        assert (await driver.ask("abc")).whole.prompt_token_ids is None

    run(llama, scenario)


def test_what_lmdeploy_tells_beside_tokens() -> None:
    """Logits that were asked for would be lost: LMDeploy tells them before the last part, not in it."""

    def out(**found: Any) -> SimpleNamespace:
        nothing = {"logits": None, "last_hidden_state": None, "routed_experts": None, "cached_tokens": 0}
        return SimpleNamespace(**{"token_ids": [1], "finish_reason": None, **nothing, **found})

    told = Told(LMDeployRequestConfig(), [7])
    assert told.take(out(logits="all of them", cached_tokens=64)) == [1]
    assert told.take(out(finish_reason="stop", routed_experts="some", token_ids=None)) == []
    assert told.with_rest(Delta()).value == {
        "logits": "all of them", "routed_experts": "some", "cached_tokens": 64,
    }  # fmt: skip
    assert Told(GenerationConfig(), [7]).with_rest(Delta()).value is None


def test_scores(llama: str) -> None:
    """A prompt would be gone on with instead of scored, or one that cannot be scored end more than itself."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        scored = await ask(driver, [1, 2, 3], score="ppl")
        assert (scored.deltas[0].value, scored.reason, scored.usage.prompt_tokens) == (2.5, "stop", 3)
        for prompt, kind, error in (
            ([1, 2], "reward", InvalidRequestError),  # of a model that is none
            ([1], "ppl", InvalidRequestError),
            ([1, 9999], "ppl", InvalidRequestError),
            ([1] * 600, "ppl", PromptTooLongError),
        ):
            assert type((await ask(driver, prompt, score=kind)).error) is error
        assert (await driver.ask("abc")).text == "abc"
        assert not driver.engine._core.session_mgr.sessions

    run(llama, scenario)


def test_an_abort_of_a_score(llama: str) -> None:
    """It would never be told, or its place be lost."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = add(driver, [1, 2, 3], score="ppl")
        await asyncio.sleep(0)
        driver.abort(answer)
        assert (await answer.wait()).reason == "abort"
        assert not driver.engine._aborted
        answers = [add(driver, [1, 2, 3], score="ppl") for _ in range(4)]
        assert [(await one.wait()).deltas[0].value for one in answers] == [2.5] * 4

    run(llama, scenario)


def test_scores_come_through_a_bridge(llama: str) -> None:
    """The core between an engine and its caller would drop a value that is no job's."""
    with scripted_gpu(), Bridge(llama, engine="lmdeploy", backend="pytorch", max_batch_size=2) as bridge:
        found = bridge.infer([[1, 2, 3], [4, 6]], LMDeployRequestConfig(score="ppl"), timeout=60)
        assert [response.value for response in found] == [2.5, 6.0]


def test_a_field_that_the_installed_lmdeploy_lacks(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request would fail with a TypeError from inside."""
    known = [
        "max_new_tokens", "min_new_tokens", "do_sample", "top_k", "temperature", "repetition_penalty", "ignore_eos",
        "skip_special_tokens", "random_seed", "response_format", "logprobs", "stop_token_ids",
    ]  # fmt: skip
    older = dataclasses.make_dataclass("GenerationConfig", [(name, Any, None) for name in known])

    async def scenario(driver: Driver, cues: Cues) -> None:
        monkeypatch.setattr("lmdeploy.GenerationConfig", older)
        refused = await ask(driver, repetition_ngram_size=3)
        assert isinstance(refused.error, UnsupportedOptionError)
        assert refused.error.param == "repetition_ngram_size"
        driver.engine._core.async_get_ppl = None
        assert isinstance((await ask(driver, [1, 2], score="ppl")).error, UnsupportedOptionError)

    run(llama, scenario)


@pytest.mark.parametrize("field", sorted(OWN_FIELDS))
def test_other_engines_refuse_them_by_name(field: str) -> None:
    """What was asked for would be dropped without a word."""
    with Bridge(ScriptedEngine) as bridge:
        config = LMDeployRequestConfig()
        setattr(config, field, True)
        with pytest.raises(UnsupportedOptionError, match=field):
            bridge.infer("a", config)
