"""Requests on LMDeploy's real control plane: what it is asked for, what it tells, and whose fault an error is."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from lmbridge.engines import engine_class, engine_factory
from lmbridge.engines.lmdeploy import LMDeployEngine
from lmbridge.engines.lmdeploy.own import LMDeployRequestConfig
from lmbridge.errors import (
    InvalidRequestError,
    LMBridgeError,
    ModelNotFoundError,
    PromptTooLongError,
    UnknownEngineError,
)
from lmbridge.messages import Prompt
from tests.conftest import until_then
from tests.engines.conftest import BYTES, EOS, byte_level_tokenizer, save_model
from tests.engines.dialect.templates import FORMS, TOOL
from tests.engines.lmdeploy_scripted import Cues, Driver, driven, scripted_gpu

Scenario = Callable[[Driver, Cues], Coroutine[Any, Any, None]]


def ids(text: str) -> list[int]:
    return list(byte_level_tokenizer().encode(text))


def run(model: str, scenario: Scenario, **options: Any) -> None:
    async def whole() -> None:
        with scripted_gpu() as cues:
            async with driven(model, **options) as driver:
                await scenario(driver, cues)

    asyncio.run(whole())


# ------------------------------------------------------------------------------------------------------------ options


def test_it_is_the_engine_of_that_name(llama: str) -> None:
    """``Bridge(model, engine="lmdeploy")`` would find no engine, or refuse an option that its documentation names."""
    assert engine_class("lmdeploy") is LMDeployEngine
    engine = engine_factory("lmdeploy", llama, {"max_batch_size": 3, "backend": "pytorch"})()
    assert engine.max_batch_size == 3
    refused = {"frequency_penalty", "presence_penalty", "logit_bias", "truncate_prompt_tokens"}
    refused |= {"add_generation_prompt", "continue_final_message", "prompt_logprobs"}
    assert engine.supports == set(LMDeployRequestConfig().__dict__) - refused
    documented = inspect.getdoc(LMDeployEngine) or ""
    for option in inspect.signature(LMDeployEngine).parameters:
        assert f"{option}:" in documented


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"backend": "triton"}, "backend"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_context": 1.5}, "max_context"),
        ({"cache_share": 1.0}, "cache_share"),
        ({"dtype": "float32"}, "dtype"),
        ({"num_blocks": 8}, "num_blocks"),
        ({"backend_config": object(), "max_context": 64}, "max_context"),
        ({"backend": "turbomind", "device": "ascend"}, "device"),
        ({"backend": "turbomind", "cache_share": 0.5, "num_blocks": 100}, "num_blocks"),
    ],
)
def test_a_wrong_option_is_named_when_the_bridge_is_made(llama: str, options: dict[str, Any], param: str) -> None:
    """The mistake would show only once the model loads, on another thread, as an assertion without words."""
    with pytest.raises(InvalidRequestError, match=param) as caught:
        engine_factory("lmdeploy", llama, options)
    assert caught.value.param == param


def test_a_missing_folder_or_engine_is_told_at_once() -> None:
    """The user would wait for a download of what is no hub id."""
    with pytest.raises(ModelNotFoundError):
        engine_factory("lmdeploy", "./no-such-folder", {})
    with pytest.raises(UnknownEngineError, match="lmdeploy"):
        engine_class("lmdeply")


def test_options_reach_lmdeploy_under_its_names(llama: str) -> None:
    """An option would be taken and have no effect."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        config = driver.engine._core.backend_config
        assert (config.max_batch_size, config.session_len, config.max_prefill_token_num) == (7, 100, 64)
        assert (config.block_size, config.num_gpu_blocks, config.dtype, config.tp) == (16, 40, "bfloat16", 1)
        assert config.cache_max_entry_count == 0.25
        assert driver.engine.max_batch_size == 7

    options = {"max_chunk_size": 64, "page_size": 16, "num_blocks": 40, "cache_share": 0.25, "tp": 1}
    run(llama, scenario, max_batch_size=7, max_context=100, dtype="bfloat16", **options)


def test_turbomind_options_reach_its_config(llama: str) -> None:
    """The same names would mean nothing with the other backend. Its GPU part is not run here."""
    from lmbridge.engines.lmdeploy.options import LMDeployOptions, build_config

    options = LMDeployOptions(llama, backend="turbomind", device="cuda", max_batch_size=5, max_context=99, page_size=32)
    backend, config = build_config(options, llama)
    assert (backend, config.max_batch_size, config.session_len, config.cache_block_seq_len) == ("turbomind", 5, 99, 32)
    _, config = build_config(LMDeployOptions(llama, backend="turbomind", num_blocks=200), llama)
    assert config.cache_max_entry_count == 200


def test_lmdeploys_own_config_is_taken_as_it_is(llama: str) -> None:
    """Whoever comes from LMDeploy could not keep the config that works for them; nor learn it has no logprobs."""
    from lmdeploy import PytorchEngineConfig

    async def scenario(driver: Driver, cues: Cues) -> None:
        assert driver.engine._core.backend_config.prefill_interval == 5
        assert driver.engine.max_batch_size == 2
        assert (await driver.ask("hello")).text == "hello"
        with pytest.raises(InvalidRequestError, match="raw_logprobs"):
            driver.add("hello", logprobs=1)

    config = PytorchEngineConfig(max_batch_size=2, prefill_interval=5, enable_metrics=False)
    run(llama, scenario, backend=None, max_batch_size=None, backend_config=config)


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_every_kind(llama: str) -> None:
    """A kind of prompt would be misread: the model answers here with what it was given."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        assert (await driver.ask("hello")).text == "hello"
        assert (await driver.ask("hello", raw=False)).text == "<user>hello<assistant>"
        turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        assert (await driver.ask(turns)).text == "<system>be brief<user>hi<assistant>"
        answer = await driver.ask(ids("tokens"))
        assert (answer.text, answer.token_ids, answer.reason) == ("tokens", ids("tokens"), "stop")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 7)
        assert (await driver.ask("blåbær 🫐")).text == "blåbær 🫐"

    run(llama, scenario)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("", InvalidRequestError),
        ([], InvalidRequestError),
        ([1, -1], InvalidRequestError),
        ([1, 264], InvalidRequestError),
        ([1, True], InvalidRequestError),
        ("half a pair \ud800", InvalidRequestError),
        ([{"role": "forbidden", "content": "x"}], InvalidRequestError),
        ([{"role": "user"}], InvalidRequestError),
        ("x" * 512, PromptTooLongError),
        ([1] * 5000, PromptTooLongError),
    ],
    ids=str,
)
def test_a_wrong_prompt_fails_alone(llama: str, prompt: Prompt, kind: type[LMBridgeError]) -> None:
    """A prompt without tokens, for one, ends LMDeploy's loop for everyone, for good."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        other = driver.add("abc" * 20)
        wrong = await driver.ask(prompt)
        assert type(wrong.error) is kind
        assert (await other.wait()).text == "abc" * 20
        assert not driver.deaths
        assert not driver.engine._core.session_mgr.sessions

    run(llama, scenario)


def test_a_prompt_that_fits_the_context_but_not_the_cache(llama: str) -> None:
    """LMDeploy would begin it with room for no answer."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        wrong = await driver.ask("x" * 300)
        assert isinstance(wrong.error, PromptTooLongError)
        answer = await driver.ask("x" * 200)
        assert (answer.reason, len(answer.token_ids)) == ("length", 224 - 200)  # 16 blocks, less one and one reserved

    run(llama, scenario, num_blocks=16, page_size=16)


# --------------------------------------------------------------------------------------------------- generation config


def test_how_tokens_are_chosen_reaches_the_sampler(llama: str) -> None:
    """A field would be accepted and dropped: LMDeploy has other defaults, and drops the penalty of greedy requests."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        await driver.ask("a", temperature=0.5, top_p=0.75, top_k=7, min_p=0.125, random_seed=5, repetition_penalty=1.25)
        seen = cues.prefills.pop()
        assert (seen["temperature"], seen["top_p"], seen["max_top_k"]) == (0.5, 0.75, 7)
        assert (seen["min_p"], seen["random_seeds"], seen["repetition_penalty"]) == (0.125, 5, 1.25)
        await driver.ask("a", do_sample=True)
        seen = cues.prefills.pop()
        assert seen["max_top_k"] == 0  # all tokens
        assert seen["temperature"] in (None, 1.0)
        assert seen["top_p"] in (None, 1.0)
        await driver.ask("a", repetition_penalty=1.25)
        seen = cues.prefills.pop()
        assert (seen["max_top_k"], seen["repetition_penalty"]) == (1, 1.25)
        settings: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"do_sample": False, "temperature": 0.9}]
        for greedy in settings:
            await driver.ask("a", **greedy)
            assert cues.prefills.pop()["max_top_k"] == 1

    run(llama, scenario)


def test_a_temperature_lmdeploy_does_not_take_is_named(llama: str) -> None:
    """It would be an assertion without words."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        with pytest.raises(InvalidRequestError, match="temperature must be at most") as caught:
            driver.add("a", temperature=2.5)
        assert caught.value.param == "temperature"

    run(llama, scenario)


def test_what_ends_an_answer(llama: str) -> None:
    """LMDeploy stops at any token that contains a stop word, ignores longer ones, and bans what it is to ignore."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = await driver.ask("one two three", stop_words=["two"])
        assert (answer.text, answer.token_ids, answer.reason) == ("one ", ids("one "), "stop")
        assert (await driver.ask("one two", stop_words=["xyz"])).text == "one two"
        answer = await driver.ask("one two three", stop_token_ids=[BYTES["w"]])
        assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("one t", "stop", 6)
        answer = await driver.ask("one", max_new_tokens=2)
        assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("on", "length", 2)
        answer = await driver.ask("one", ignore_eos=True, max_new_tokens=6)
        assert (answer.reason, len(answer.token_ids)) == ("length", 6)
        assert EOS not in answer.token_ids
        answer = await driver.ask("one two", ignore_eos=True, stop_token_ids=[BYTES["w"]])
        assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("one t", "stop", 6)

    run(llama, scenario)


def test_the_chat_templates_own_endings_stay(llama: str) -> None:
    """LMDeploy forgets them when the request names stop tokens: the model would go on and speak the user's part too."""
    from lmdeploy import ChatTemplateConfig

    async def scenario(driver: Driver, cues: Cues) -> None:
        settings: list[dict[str, Any]] = [{}, {"stop_token_ids": [BYTES["z"]]}]
        for config in settings:
            assert (await driver.ask("one two three", **config)).text == "one t"

    run(llama, scenario, chat_template_config=ChatTemplateConfig(model_name="base", stop_words=["w"]))


def test_special_tokens_are_left_out_or_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Special tokens in the middle of an answer would always vanish, or always show."""
    model = save_model(tmp_path_factory.mktemp("models") / "marked")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<mark>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    prompt = [*ids("a"), tokenizer.convert_tokens_to_ids("<mark>"), *ids("b")]

    async def scenario(driver: Driver, cues: Cues) -> None:
        shown = await driver.ask(prompt, skip_special_tokens=False)
        assert (shown.text, shown.token_ids) == ("a<mark>b", prompt)
        hidden = await driver.ask(prompt)
        assert (hidden.text, hidden.token_ids) == ("ab", prompt)

    run(model, scenario)


def test_tools_reach_the_template_and_calls_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The model would never hear of its tools, or its calls would be shown as text."""
    form = FORMS["hermes"]
    model = save_model(tmp_path_factory.mktemp("models") / "tools", max_position_embeddings=2048)
    byte_level_tokenizer(form.template).save_pretrained(model)
    messages = [{"role": "user", "content": "Hi."}]

    async def scenario(driver: Driver, cues: Cues) -> None:
        told = await driver.ask(messages, tools=[TOOL], max_new_tokens=1000)
        assert "Look out of a window." in told.text
        assert "window" not in (await driver.ask(messages, tools=[TOOL], tool_choice="none", max_new_tokens=1000)).text
        calls = await driver.ask(ids(form.answer), tools=[TOOL], max_new_tokens=1000)
        assert (calls.text, [call.name for call in calls.whole.tool_calls]) == (form.said, ["look", "look"])
        assert calls.reason == "tool_calls"

    run(model, scenario)


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_logprobs_have_an_entry_per_token_the_token_first(llama: str, wanted: int) -> None:
    """They would be missing (LMDeploy takes 0 for none), or shifted against the tokens."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = await driver.ask("abcd", logprobs=wanted, stop_words=["d"])
        assert answer.token_ids == ids("abc")
        assert [next(iter(entry)) for entry in answer.logprobs] == ids("abc")
        assert [entry[token] for entry, token in zip(answer.logprobs, ids("abc"), strict=True)] == [-1.0] * 3
        assert {len(entry) for entry in answer.logprobs} == {max(1, wanted)}
        assert (await driver.ask("abcd")).whole.logprobs is None

    run(llama, scenario)


# --------------------------------------------------------------------------------------------------------- many at once


def test_never_more_inside_than_lmdeploy_has_places(llama: str) -> None:
    """A request that waits inside LMDeploy cannot be aborted. Places are free again when the last delta comes."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        engine, pool = driver.engine, driver.engine._core.session_mgr.request_handle_pool
        free = engine.stats()["cache_free"]  # before 0.18 a block that LMDeploy keeps for itself is not counted
        for _ in range(20):
            batch = [driver.add("abc" * 5) for _ in range(engine.max_batch_size)]
            for answer in batch:
                await answer.wait()
                assert pool.size - pool.num_dispatched >= engine.max_batch_size - engine.stats()["in_flight"]
        await engine_idle(driver)
        assert pool.num_dispatched == 0
        assert engine.stats()["cache_free"] == free

    run(llama, scenario)


async def engine_idle(driver: Driver) -> None:
    """Until the tasks of requests that have told their last are gone too."""
    await until_then(lambda: not driver.engine.stats()["in_flight"])


def test_stats_are_lmdeploys_own(llama: str) -> None:
    """Health and metrics would say that nothing goes on."""

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = driver.add("abc" * 50)
        await answer.first()
        stats = driver.engine.stats()
        assert (stats["in_flight"], stats["running"], stats["waiting"]) == (1, 1, 0)
        assert stats["steps"] >= 1
        assert stats["tokens"] >= 1
        assert 0 < stats["cache_free"] < 1
        await answer.wait()
        assert driver.engine.stats()["tokens"] == 150

    run(llama, scenario)


def test_a_request_the_model_fails_is_failed_alone(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDeploy's own error of a request would end as a truncated success, or take the others with it."""
    from lmdeploy.messages import EngineOutput, ResponseType
    from lmdeploy.pytorch.engine.engine_instance import EngineInstance

    real = EngineInstance.async_stream_infer

    async def failing(self: Any, session_id: int, input_ids: list[int], **rest: Any) -> Any:
        if input_ids == ids("bad"):
            yield EngineOutput(ResponseType.OUT_OF_MEMORY, [])
            return
        async for out in real(self, session_id, input_ids, **rest):
            yield out

    monkeypatch.setattr(EngineInstance, "async_stream_infer", failing)

    async def scenario(driver: Driver, cues: Cues) -> None:
        other = driver.add("abc" * 20)
        assert "LMDeploy failed the request" in str((await driver.ask("bad")).error)
        assert (await other.wait()).text == "abc" * 20
        assert not driver.deaths

    run(llama, scenario)


def test_the_models_context_is_the_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An answer would run on past what the model was trained for."""
    model = save_model(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=64)

    async def scenario(driver: Driver, cues: Cues) -> None:
        answer = await driver.ask("x" * 40)
        assert (answer.reason, len(answer.token_ids)) == ("length", 24)
        assert isinstance((await driver.ask("x" * 64)).error, PromptTooLongError)

    run(model, scenario)
