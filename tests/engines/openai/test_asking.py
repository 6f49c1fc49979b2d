"""What is asked for reaches the far end as it was meant, in the words of each kind of server, or is refused by name."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from lmbridge import Bridge, GenerationConfig, InvalidRequestError, PromptTooLongError, UnsupportedOptionError
from lmbridge.engines.openai.asking import put_question
from lmbridge.engines.openai.flavours import ANY, FLAVOURS, flavour_of
from lmbridge.messages import Overrides, Prompt, Request
from lmbridge.testing import ScriptedEngine
from tests.engines.openai.conftest import PATIENCE, Far, Rude, answer, events, http

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "paint", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FOR_BOTH: Overrides = {
    "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5,
    "random_seed": 11, "stop_words": ["x", "yy"], "stop_token_ids": [5, 6], "skip_special_tokens": False,
    "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {7: 1.5}, "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 9, "return_prompt_token_ids": True, "logprobs": 2,
}  # fmt: skip
FOR_CHATS: Overrides = {
    **FOR_BOTH,
    "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True,
    "separate_reasoning": True,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "paint"}},
    "parallel_tool_calls": False,
}


def question(flavour: str, prompt: Prompt = "hello", raw: bool = False, **fields: Any) -> dict[str, Any]:
    config = GenerationConfig().merged(fields)  # type: ignore[arg-type]
    request = Request("id", prompt, config, raw, "me", 0, None, 0.0, contextvars.copy_context())
    return dict(put_question(request, FLAVOURS[flavour], {}).body)


@pytest.mark.parametrize(
    ("prompt", "raw", "fields"),
    [
        ([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], False, FOR_CHATS),
        ("hi", True, FOR_BOTH),
        ([1, 2, 3], False, {**FOR_BOTH, "min_new_tokens": 3}),
        ("hi", True, {"grammar": {"regex": "a+"}}),
        ("hi", True, {"grammar": {"choice": ["a", "b"]}}),
        ("hi", True, {"grammar": {"lark": "start: /a/"}}),
        ([{"role": "user", "content": "hi"}], False, {"ignore_eos": True, "add_generation_prompt": False}),
    ],
)
def test_every_field_reaches_the_far_end(serve: Callable[..., Far], prompt: Any, raw: bool, fields: Any) -> None:
    """A setting that got lost on the way would be a wrong answer that looks like a right one."""
    asked: list[Request] = []

    def script(request: Request) -> list[str]:
        asked.append(request)
        return ["done"]

    with Bridge(serve(ScriptedEngine(script)).url) as bridge:
        bridge.infer(prompt, raw=raw, timeout=PATIENCE, **fields)
    (request,) = asked
    expected = GenerationConfig().merged(fields)
    for name in fields:
        assert getattr(request.config, name) == getattr(expected, name), name
    assert request.config.samples == expected.samples
    assert request.prompt == (prompt if not isinstance(prompt, str) or raw else [{"role": "user", "content": prompt}])
    assert request.raw == (raw and isinstance(prompt, str))


def test_a_schema_reaches_the_far_end_whole(serve: Callable[..., Far]) -> None:
    """Whether it is given as OpenAI has it, as a grammar or as a class."""
    asked: list[Request] = []

    class Point(pydantic.BaseModel):
        x: int

    def script(request: Request) -> list[str]:
        asked.append(request)
        return ["done"]

    described = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    with Bridge(serve(ScriptedEngine(script)).url) as bridge:
        bridge.infer("a", response_format=described, timeout=PATIENCE)
        bridge.infer("a", grammar={"json": SCHEMA}, timeout=PATIENCE)
        bridge.infer("a", response_format=Point, timeout=PATIENCE)
    forms = [request.config.form for request in asked]
    expected = GenerationConfig(response_format=Point).form
    assert expected is not None
    assert [form.value for form in forms if form] == [SCHEMA, SCHEMA, expected.value]


def test_greedy_is_said() -> None:
    """Servers sample unless they are told not to, and callers who ask for nothing expect the most likely answer."""
    assert question("openai")["temperature"] == 0
    assert question("openai", top_p=0.5)["temperature"] == 1
    assert question("openai", do_sample=False, temperature=0.7)["temperature"] == 0


def test_each_kind_of_server_has_its_words() -> None:
    """A name that a server does not know it leaves out without a word."""
    assert question("openai")["max_completion_tokens"] == 512
    assert question("vllm", "a", True)["max_tokens"] == 512
    assert question("llamacpp", repetition_penalty=1.5)["repeat_penalty"] == 1.5
    assert question("tabbyapi", chat_template_kwargs={"a": 1})["template_vars"] == {"a": 1}
    assert question("vllm", min_new_tokens=3)["min_tokens"] == 3
    assert question("lmdeploy", min_new_tokens=3)["min_new_tokens"] == 3
    assert question("lmdeploy", grammar={"choice": ["a.", "b"]})["response_format"]["regex_schema"] == r"a\.|b"
    assert question("llamacpp", grammar={"choice": ['"', "b"]})["grammar"] == 'root ::= "\\"" | "b"'
    assert question("llamacpp", response_format={"type": "json_object"})["json_schema"] == {"type": "object"}
    assert question("vllm", grammar={"regex": "a"})["structured_outputs"] == {"regex": "a"}
    named = question("openai", response_format={"type": "json_schema", "json_schema": {"schema": {}, "strict": True}})
    assert named["response_format"]["json_schema"] == {"name": "answer", "schema": {}, "strict": True}


@pytest.mark.parametrize(
    ("flavour", "fields", "more"),
    [
        ("openai", {"grammar": {"regex": "a"}}, {}),
        ("llamacpp", {"grammar": "start: /a/"}, {}),
        ("llamacpp", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "paint"}}}, {}),
        ("lmdeploy", {"logit_bias": {1: 1.0}}, {"raw": True}),
        ("lmbridge", {"tools": [TOOL]}, {"raw": True}),
        ("vllm", {"chat_template_kwargs": {"a": 1}}, {"prompt": [1, 2]}),
    ],
)
def test_what_a_server_would_ignore_is_refused(flavour: str, fields: Any, more: Any) -> None:
    """By the name that the caller knows."""
    with pytest.raises(UnsupportedOptionError) as caught:
        question(flavour, **more, **fields)
    assert caught.value.param in fields


def test_what_no_server_of_the_kind_honours_is_refused(rude: Callable[..., Rude]) -> None:
    """Each kind honours what its lists say; the rest never reaches it."""
    server = rude(answer("yes"), models=http(200, {"data": [{"id": "m", "owned_by": "somebody"}]}))
    with Bridge(server.url) as bridge:
        assert bridge.infer("a", timeout=PATIENCE).text == "yes"
        assert bridge.supports() == flavour_of("somebody").supports
        with pytest.raises(UnsupportedOptionError, match="top_k"):
            bridge.infer("a", top_k=3, timeout=PATIENCE)
        with pytest.raises(UnsupportedOptionError, match="prompt_logprobs"):
            bridge.infer("a", prompt_logprobs=3, timeout=PATIENCE)
    assert len(server.asked) == 1
    assert server.asked[0]["max_tokens"] == 512
    with Bridge(server.url, flavour="vllm", extra_body={"priority": 3}) as bridge:
        bridge.infer("a", top_k=3, timeout=PATIENCE)
    assert server.asked[-1]["top_k"] == server.asked[-1]["priority"] == 3
    assert all(flavour.supports <= ANY for flavour in FLAVOURS.values())


def test_keys_and_addresses_come_from_the_environment(
    rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every client of OpenAI's has it; the key is nowhere to be read."""
    server = rude(answer("yes"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-mine")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    with Bridge("m", engine="openai") as bridge:
        assert bridge.infer("a", timeout=PATIENCE).text == "yes"
        assert "sk-of-mine" not in f"{bridge!r} {bridge.describe()}"
    assert "bearer sk-of-mine" in server.heads[0].lower()
    assert server.asked[0]["model"] == "m"
    with Bridge("m", engine="openai", api_key="another") as bridge:
        bridge.infer("a", timeout=PATIENCE)
    assert "bearer another" in server.heads[-1].lower()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"model": "http://"}, "model"),
        ({"model": "http://a/v1?x=1"}, "model"),
        ({"model": "http://a,ftp://b"}, "model"),
        ({"model": "http://a/v1/chat/completions"}, "model"),
        ({"model": "http://a/v1/completions/"}, "model"),
        ({"model": "m", "base_url": ["http://a/v1", "http://b/v1/models"]}, "base_url"),
        ({"model": "http://a/v1/embeddings"}, "model"),
        ({"model": "m", "base_url": "host:8000"}, "base_url"),
        ({"model": "m", "base_url": ""}, "base_url"),
        ({"model": "m", "base_url": []}, "base_url"),
        ({"model": "http://a", "base_url": "http://b"}, "base_url"),
        ({"model": "m", "model_name": "n"}, "model_name"),
        ({"model": "http://a", "model_name": ""}, "model_name"),
        ({"model": "http://a", "api_key": 7}, "api_key"),
        ({"model": "http://a", "flavour": "sour"}, "flavour"),
        ({"model": "http://a", "task": "call"}, "task"),
        ({"model": "http://a", "max_batch_size": 0}, "max_batch_size"),
        ({"model": "http://a", "max_batch_size": 5000}, "max_batch_size"),
        ({"model": "http://a", "extra_body": {"a": object()}}, "extra_body"),
        ({"model": "http://a", "colour": 1}, "colour"),
    ],
)
def test_wrong_options_are_refused_at_once(options: Any, param: str) -> None:
    """Before anybody is asked, and by name."""
    with pytest.raises(InvalidRequestError) as caught:
        Bridge(options.pop("model"), engine="openai", **options)
    assert caught.value.param == param


# --- the length of an answer that nobody has asked for ---

LIMITS = [
    "This model's maximum context length is 300 tokens. However, you requested 612 tokens (100 in the messages, 512 in "
    "the completion). Please reduce the length of the messages or completion.",
    "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 300 tokens and "
    "your request has 100 input tokens (512 > 300 - 100).",
    "This model's maximum context length is 300 tokens. However, you requested 512 output tokens and your prompt "
    "contains 100 input tokens, for a total of 612 tokens.",
    "max_tokens=512 cannot be greater than max_model_len=300. Please request fewer output tokens.",
]
"""What vLLM's versions say of it."""


@pytest.mark.parametrize("words", LIMITS)
def test_a_default_that_does_not_fit(rude: Callable[..., Rude], words: str) -> None:
    """A long prompt is answered with what room is left, as every engine in the process does it."""
    refusal = http(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
    said = events({"choices": [{"index": 0, "text": "yes", "finish_reason": "length"}]}, "[DONE]")
    server = rude(refusal, answer("yes"), refusal, said)
    with Bridge(server.url) as bridge:
        assert bridge.infer("a", timeout=PATIENCE).text == "yes"
        assert bridge.infer("a", raw=True, timeout=PATIENCE).text == "yes"
    left = 300 if "max_model_len" in words else 200
    assert [body["max_tokens"] for body in server.asked] == [512, None, 512, left]


def test_a_length_of_the_callers_own_is_left_to_the_server(rude: Callable[..., Rude]) -> None:
    """Who asks for 600 tokens wants no fewer without a word; and a prompt that is too long stays so."""
    for words, tokens, times in (
        (LIMITS[0].replace("512", "600"), 600, 1),
        ("This model's maximum context length is 300 tokens. However, your prompt contains 512 input tokens.", 512, 1),
        (LIMITS[0], 512, 2),
    ):
        server = rude(http(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}))
        with Bridge(server.url) as bridge, pytest.raises(PromptTooLongError):
            bridge.infer("a", max_new_tokens=tokens, timeout=PATIENCE)
        assert len(server.asked) == times
