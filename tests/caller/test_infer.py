"""One prompt, one answer, from any thread."""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import (
    Bridge,
    EngineError,
    GenerationConfig,
    InvalidRequestError,
    RequestAbortedError,
    RequestTimeoutError,
    WrongThreadError,
)
from lmbridge.messages import Request
from lmbridge.testing import ScriptedEngine
from tests.conftest import until

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_answer_with_its_facts(scripted: Scripted) -> None:
    """A caller gets text, token ids, why it ended, token counts and times that are consistent."""
    bridge, _ = scripted()
    response = bridge.infer("three small words")
    assert (response.text, response.token_ids, response.finish_reason) == ("three small words", [1, 2, 3], "stop")
    assert (response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.total_tokens) == (3, 3, 6)
    timings = response.timings
    assert timings.first_token is not None
    assert 0 <= timings.queued <= timings.first_token <= timings.total


def test_every_thread_gets_its_own_answer(scripted: Scripted) -> None:
    """64 threads with 20 prompts each: nobody gets somebody else's answer, and the engine ends up empty."""
    bridge, _ = scripted(ScriptedEngine(max_batch_size=16))

    def ask(thread: int) -> list[bool]:
        prompts = [f"thread {thread} asks number {number}" for number in range(20)]
        return [bridge.infer(prompt).text == prompt for prompt in prompts]

    with ThreadPoolExecutor(64) as pool:
        answers = [right for rights in pool.map(ask, range(64)) for right in rights]
    assert len(answers) == 64 * 20
    assert all(answers)
    until(lambda: bridge.requests() == [])
    assert bridge.stats()["in_flight"] == 0


def test_only_the_server_thread_touches_the_engine(scripted: Scripted) -> None:
    """An engine that is not thread-safe is safe: start, add and abort all happen on one thread, not the caller's."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(bridge.stream, ["a b", "c d", "e f", "g h"]))
        engine.wait_for(lambda e: e.active == 4)
    for stream in streams:
        stream.close()
    engine.wait_for(lambda e: e.active == 0)
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


@pytest.mark.parametrize(
    "prompt",
    ["", [{"content": "no role"}], [{"role": "user"}], [1, -1], [1, True], 5, None, {"role": "user"}, b"bytes"],
)
def test_wrong_prompt_is_refused_at_once(scripted: Scripted, prompt: Any) -> None:
    """A prompt that cannot be one raises in the caller, before a model is even loaded, and names the argument."""
    bridge, _ = scripted()
    for verb in (bridge.infer, bridge.stream, bridge.submit):
        with pytest.raises(InvalidRequestError) as caught:
            verb(prompt)
        assert caught.value.param == "prompt"
    assert bridge.state == "new"


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"max_tokens": 5}, "max_tokens", "use max_new_tokens"),
        ({"seed": 5}, "seed", "use random_seed"),
        ({"stop": ["x"]}, "stop", "use stop_words"),
        ({"temprature": 1.0}, "temprature", "the fields are"),
        ({"temperature": -1}, "temperature", ">= 0"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"max_new_tokens": 0}, "max_new_tokens", ">= 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens", "an int"),
        ({"stop_words": "word"}, "stop_words", "a list"),
        ({"timeout": -1}, "timeout", ">= 0"),
        ({"priority": "high"}, "priority", "an int"),
        ({"client": ""}, "client", "non-empty"),
        ({"config": {"top_k": 3}}, "config", "a GenerationConfig"),
    ],
)
def test_wrong_option_is_named(scripted: Scripted, options: dict[str, Any], param: str, says: str) -> None:
    """A misspelt or impossible option is named, with what to write instead; nothing is dropped in silence."""
    bridge, _ = scripted()
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        bridge.infer("hello", **options)
    assert caught.value.param == param


def test_openai_name_in_the_config_itself() -> None:
    """GenerationConfig(max_tokens=…) tells which name to use."""
    with pytest.raises(InvalidRequestError, match="use max_new_tokens"):
        GenerationConfig(max_tokens=5)  # type: ignore[call-arg]


def test_config_is_copied_at_submission(scripted: Scripted) -> None:
    """Changing a config after the call does not change the request that has been sent with it."""
    seen: list[GenerationConfig] = []

    def script(request: Request) -> list[str]:
        seen.append(request.config)
        return ["a", "b"]

    bridge, engine = scripted(ScriptedEngine(script, manual=True))
    config = GenerationConfig(max_new_tokens=7)
    future = bridge.submit("go", config, temperature=0.5)
    config.max_new_tokens = 1
    engine.wait_for(lambda e: e.active == 1)
    engine.step(2)
    assert future.result(10).text == "ab"
    assert (seen[0].max_new_tokens, seen[0].temperature) == (7, 0.5)
    assert config.temperature is None


@pytest.mark.parametrize(
    ("fields", "samples"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"random_seed": 1}, True),
        ({"temperature": 0.0, "top_p": 0.9}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"repetition_penalty": 1.2}, False),
    ],
)
def test_when_an_answer_is_sampled(fields: dict[str, Any], samples: bool) -> None:
    """Giving a sampling field samples, giving none is greedy, and do_sample decides where it is set."""
    assert GenerationConfig(**fields).samples is samples


def test_engine_refusing_one_request_serves_the_next(scripted: Scripted) -> None:
    """What the engine refuses fails alone, with the engine's own error, and the engine goes on."""
    bridge, engine = scripted()
    engine.refuse("bad", InvalidRequestError("too long for this engine", "prompt"))
    with pytest.raises(InvalidRequestError, match="too long for this engine"):
        bridge.infer("bad")
    assert bridge.infer("good").text == "good"


def test_engine_failing_one_request_serves_the_next(scripted: Scripted) -> None:
    """A failure in the middle of one answer reaches its own caller with the cause chained, and nobody else."""
    bridge, engine = scripted()
    engine.fail("poison", ValueError("bad token"))
    with ThreadPoolExecutor(2) as pool:
        poisoned = pool.submit(bridge.infer, "poison")
        healthy = pool.submit(bridge.infer, "some healthy words")
        assert healthy.result(10).text == "some healthy words"
        error = poisoned.exception(10)
    assert isinstance(error, EngineError)
    assert isinstance(error.__cause__, ValueError)
    assert error.request_id is not None


def test_engine_that_tries_to_exit_fails_one_request(scripted: Scripted) -> None:
    """A library calling exit() inside one request does not take the server thread with it."""
    bridge, engine = scripted()
    engine.refuse("exit", SystemExit(1))
    with pytest.raises(EngineError, match="SystemExit"):
        bridge.infer("exit")
    assert bridge.infer("still here").text == "still here"


def test_deadline_carries_what_was_generated(scripted: Scripted) -> None:
    """A caller whose time is up gets a TimeoutError with the text so far, and the engine stops working on it."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bridge.infer, "one two three four", timeout=1.0)
        engine.wait_for(lambda e: e.active == 1)
        engine.step(2)
        error = waiting.exception(10)
    assert isinstance(error, RequestTimeoutError)
    assert isinstance(error, TimeoutError)
    assert error.partial == "one two"
    engine.wait_for(lambda e: e.active == 0)


def test_deadline_holds_while_the_loop_is_blocked(scripted: Scripted) -> None:
    """A caller is not held by an engine that blocks the whole loop: it keeps its own deadline."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    release = threading.Event()
    engine.block(release)
    with pytest.raises(RequestTimeoutError):
        bridge.infer("hello", timeout=0.2)
    release.set()


def _while_loading(scripted: Scripted) -> Bridge:
    bridge, _ = scripted(ScriptedEngine(start_gate=threading.Event()))
    return bridge


def _while_restarting(scripted: Scripted) -> Bridge:
    engines = [ScriptedEngine(), ScriptedEngine(start_gate=threading.Event())]
    built = iter(engines)
    bridge, _ = scripted(lambda: next(built))
    bridge.start()
    engines[0].crash(ValueError("lost power"))
    until(lambda: bridge.state == "restarting")
    return bridge


def _at_the_gate(scripted: Scripted) -> Bridge:
    bridge = _behind_another(scripted)
    bridge.submit("queued")
    return bridge


def _behind_another(scripted: Scripted) -> Bridge:
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    return bridge


def _in_a_silent_engine(scripted: Scripted) -> Bridge:
    bridge, _ = scripted(ScriptedEngine(manual=True))
    return bridge.start()


def _in_a_slow_engine(scripted: Scripted) -> Bridge:
    bridge, _ = scripted(ScriptedEngine(lambda request: ["word"] * 10_000, step_time=0.001))
    return bridge.start()


@pytest.mark.parametrize(
    ("situation", "where", "advice"),
    [
        (_while_loading, "while the model was loading", r"bridge.start\(\)"),
        (
            _while_restarting,
            r"while the engine was restarting .*'lost power'.*",
            "Send it again later. health.. says when",
        ),
        (_at_the_gate, "while the queue was full .requests waiting: 1.", "send fewer requests at once"),
        (_behind_another, "in the queue", "longer timeout. health.. says what delays the queue"),
        (_in_a_silent_engine, "in the engine", "No token had arrived"),
        (_in_a_slow_engine, "in the engine", "longer timeout, or lower max_new_tokens"),
    ],
)
def test_a_timeout_says_what_held_the_call(
    scripted: Scripted, situation: Callable[[Scripted], Bridge], where: str, advice: str
) -> None:
    """Who waited behind a dead or loading engine would be told to ask for fewer tokens, and look in the wrong place."""
    bridge = situation(scripted)
    with pytest.raises(RequestTimeoutError, match=rf"deadline after [\d.]+ s {where}; .*{advice}"):
        bridge.infer("late", timeout=0.3, max_new_tokens=10_000)


def test_bridge_default_timeout_applies(scripted: Scripted) -> None:
    """The bridge's own timeout limits calls that name none."""
    bridge, _ = scripted(ScriptedEngine(manual=True), timeout=0.1)
    with pytest.raises(RequestTimeoutError):
        bridge.infer("never stepped")


def test_abort_by_id(scripted: Scripted) -> None:
    """bridge.abort(id) ends the call of that id for its caller and on the engine; others go on."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bridge.infer, "one two three", request_id="mine")
        other = pool.submit(bridge.infer, "four five")
        engine.wait_for(lambda e: e.active == 2)
        engine.step()
        bridge.abort("mine")
        bridge.abort("nobody's")
        error = first.exception(10)
        engine.step(2)
        assert other.result(10).text == "four five"
    assert isinstance(error, RequestAbortedError)
    assert (error.partial, error.request_id) == ("one", "mine")
    assert engine.aborted == ["mine"]


def test_same_id_twice_is_refused(scripted: Scripted) -> None:
    """Two living requests cannot share an id; the first is not harmed by the second."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    first = bridge.submit("one", request_id="same")
    engine.wait_for(lambda e: e.active == 1)
    with pytest.raises(InvalidRequestError, match="same"):
        bridge.infer("two", request_id="same")
    engine.step()
    assert first.result(10).text == "one"


def test_blocking_call_on_the_server_thread_is_refused(scripted: Scripted) -> None:
    """An engine (or a callback) that calls infer on the server thread is told so instead of hanging for ever."""
    caught: list[BaseException] = []

    def script(request: Request) -> list[str]:
        if request.prompt == "outer":
            with pytest.raises(WrongThreadError, match="ainfer") as refused:
                bridge.infer("inner")
            caught.append(refused.value)
        return ["ok"]

    bridge, _ = scripted(ScriptedEngine(script))
    assert bridge.infer("outer").text == "ok"
    assert len(caught) == 1


def test_nested_calls_on_one_client(scripted: Scripted) -> None:
    """A call made while a stream of the same thread is being read gets its own answer."""
    bridge, _ = scripted(ScriptedEngine())
    heard = ""
    for delta in bridge.stream("outer story here"):
        heard += delta.text
        assert bridge.infer("inner question").text == "inner question"
    assert heard == "outer story here"


def test_context_variables_reach_the_engine(scripted: Scripted) -> None:
    """A context variable set by the caller is visible to the engine while it takes the request."""
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")
    bridge, _ = scripted(ScriptedEngine(lambda request: [user.get()]))

    def ask(name: str) -> str:
        user.set(name)
        return bridge.infer("who am I?").text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, ["ann", "bob", "cyd"])) == ["ann", "bob", "cyd"]


# ----------------------------------------------------------------------------------------- what belongs to the prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"return_prompt_token_ids": 1}, "return_prompt_token_ids"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(scripted: Scripted, fields: dict[str, Any], param: str) -> None:
    """A client's mistake would change the answer in a way that nobody asked for."""
    bridge, engine = scripted()
    with pytest.raises(InvalidRequestError, match=param) as refused:
        bridge.infer([{"role": "user", "content": "hi"}], **fields)
    assert refused.value.param == param
    assert engine.started == []


@pytest.mark.parametrize(
    ("prompt", "raw", "fields", "param"),
    [
        ("hi", False, {"continue_final_message": True}, "continue_final_message"),
        ([1, 2], False, {"add_generation_prompt": False}, "add_generation_prompt"),
        ([1, 2], False, {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("hi", True, {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_is_for_a_conversation_goes_with_one(
    scripted: Scripted, prompt: Any, raw: bool, fields: dict[str, Any], param: str
) -> None:
    """A switch of the chat template would be ignored where no template is used."""
    bridge, _ = scripted()
    with pytest.raises(InvalidRequestError) as refused:
        bridge.infer(prompt, raw=raw, **fields)
    assert refused.value.param == param
    with pytest.raises(InvalidRequestError):
        bridge.infer([prompt], raw=raw, **fields)
    chat = [{"role": "user", "content": "hi"}]
    assert [answer.text for answer in bridge.infer([chat, chat], **fields)] == ["hi", "hi"]


def test_a_prompt_comes_with_its_answer_once(scripted: Scripted) -> None:
    """A client that asks for the prompt's tokens or log-probabilities would lose them among an answer's many pieces."""
    bridge, _ = scripted()
    text = " ".join(f"word{number}" for number in range(300))  # more deltas than are kept apart
    response = bridge.infer(text, prompt_logprobs=1, truncate_prompt_tokens=3)
    assert response.text == text
    assert response.prompt_token_ids is not None
    assert response.prompt_logprobs is not None
    _, second, third = response.prompt_token_ids
    assert list(response.prompt_logprobs) == [None, {second: -1.0, 2000: -0.1}, {third: -2.0, 2000: -0.1}]
    stream = bridge.stream(text, return_prompt_token_ids=True, truncate_prompt_tokens=1)
    told = [delta.prompt_token_ids for delta in stream]
    assert told[0] == stream.response.prompt_token_ids == [third]
    assert set(told[1:]) <= {None}
    assert stream.response.prompt_logprobs is None
    assert bridge.infer("x").prompt_token_ids is None
