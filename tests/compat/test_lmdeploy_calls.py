"""Every call of LMDeploy's pipeline page, on the bundled model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.compat.lmdeploy import (
    GenerationConfig,
    Pipeline,
    PytorchEngineConfig,
    Response,
    TurbomindEngineConfig,
    pipeline,
)
from lmbridge.testing import ScriptedEngine

SHORT = GenerationConfig(max_new_tokens=8)
PROMPTS = ["Hi, how are you?", "Tell me a story", "What is the capital of France?"]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline("demo") as built:
        yield built


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[Response]:
    """Each prompt's short answer, asked one after another."""
    return [pipe(prompt, gen_config=SHORT) for prompt in PROMPTS]


def test_default_parameters(pipe: Pipeline) -> None:
    """One prompt gives one Response with LMDeploy's fields, and says what the Bridge says by greedy decoding."""
    response = pipe("What is the capital of France?")
    with Bridge("demo") as bridge:
        expected = bridge.infer("What is the capital of France?", max_new_tokens=512, do_sample=False)
    assert isinstance(response, Response)
    assert (response.text, response.token_ids) == (expected.text, expected.token_ids)
    assert response.finish_reason == "stop"
    assert response.generate_token_len == len(expected.token_ids)
    assert response.input_token_len == expected.usage.prompt_tokens
    assert (response.index, response.error_code, response.logprobs) == (0, None, None)


def test_a_list_of_prompts(pipe: Pipeline, alone: list[Response]) -> None:
    """A list gives a list in order, each answer with its place as index; no prompts give none."""
    responses = pipe(PROMPTS, gen_config=SHORT)
    assert [r.text for r in responses] == [r.text for r in alone]
    assert [r.index for r in responses] == [0, 1, 2]
    assert pipe([]) == []
    assert isinstance(pipe(PROMPTS[:1], gen_config=SHORT), list)


def test_messages(pipe: Pipeline, alone: list[Response]) -> None:
    """OpenAI's messages are one prompt, a list of them a batch; content may be text parts, a line each."""
    messages = [{"role": "user", "content": PROMPTS[0]}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi,"}, {"type": "text", "text": "there"}]}]
    assert pipe(messages, gen_config=SHORT).text == alone[0].text
    assert [r.text for r in pipe([messages], gen_config=SHORT)] == [alone[0].text]
    assert pipe(parts, gen_config=SHORT).text == pipe("Hi,\nthere", gen_config=SHORT).text


def test_without_the_chat_template(pipe: Pipeline) -> None:
    """do_preprocess=False gives the text to the model as it is, as raw=True does."""
    whole = pipe("once upon", gen_config=SHORT, do_preprocess=False)
    with Bridge("demo") as bridge:
        assert whole.text == bridge.infer("once upon", raw=True, max_new_tokens=8).text
    assert whole.input_token_len < pipe("once upon", gen_config=SHORT).input_token_len


def test_sampling_parameters(pipe: Pipeline) -> None:
    """Sampling is LMDeploy's: only with do_sample, then with its defaults; the same seed gives the same text."""
    config = GenerationConfig(do_sample=True, random_seed=7, temperature=1.5, max_new_tokens=12)
    first, again = pipe(["Tell me a story"] * 2, gen_config=config)
    with Bridge("demo") as bridge:
        same = bridge.infer(
            "Tell me a story", max_new_tokens=12, do_sample=True, random_seed=7, temperature=1.5, top_k=50
        )
    assert first.text == again.text == same.text
    greedy = GenerationConfig(random_seed=7, temperature=1.5, repetition_penalty=1.9, max_new_tokens=8)
    assert pipe("Tell me a story", gen_config=greedy).text == pipe("Tell me a story", gen_config=SHORT).text


def test_a_config_for_each_prompt(pipe: Pipeline) -> None:
    """A list of configs goes prompt by prompt, and one that was changed after it was made counts as changed."""
    configs = [GenerationConfig(max_new_tokens=3), GenerationConfig(max_new_tokens=3, stop_words=["!"])]
    configs[0].max_new_tokens = 5
    responses = pipe(["Hi", "Hi"], gen_config=configs)
    assert [r.generate_token_len for r in responses] == [5, 1]
    assert [r.finish_reason for r in responses] == ["length", "stop"]


def test_logprobs(pipe: Pipeline) -> None:
    """logprobs has an entry for every token, parts joined too."""
    config = GenerationConfig(max_new_tokens=4, logprobs=2)
    whole = pipe("Hi", gen_config=config)
    parts = list(pipe.stream_infer("Hi", gen_config=config))
    assert whole.logprobs is not None
    assert [next(iter(entry)) for entry in whole.logprobs] == whole.token_ids
    assert [entry for part in parts for entry in part.logprobs or ()] == whole.logprobs


def test_stream_infer(pipe: Pipeline, alone: list[Response]) -> None:
    """The parts of one prompt join to the answer; only the last one has a finish_reason."""
    parts = list(pipe.stream_infer(PROMPTS[0], gen_config=SHORT))
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.extend(part)
    assert joined == alone[0]


def test_stream_infer_of_several_prompts(pipe: Pipeline, alone: list[Response]) -> None:
    """The parts of several prompts come mixed; by index they join to the answers."""
    joined: dict[int, Response] = {}
    for part in pipe.stream_infer(PROMPTS, gen_config=SHORT):
        joined[part.index] = joined[part.index].extend(part) if part.index in joined else part
    assert [joined[place].text for place in range(3)] == [r.text for r in alone]
    assert [joined[place].finish_reason for place in range(3)] == [r.finish_reason for r in alone]
    assert list(pipe.stream_infer([])) == []


def test_stream_infer_of_whole_answers(pipe: Pipeline, alone: list[Response]) -> None:
    """stream_response=False gives each answer once, whole."""
    answers = {part.index: part for part in pipe.stream_infer(PROMPTS, gen_config=SHORT, stream_response=False)}
    assert [answers[place].text for place in range(3)] == [r.text for r in alone]


@pytest.mark.parametrize("when_full", ["block", "reject"])
def test_lists_longer_than_the_queue(when_full: str) -> None:
    """A list's own prompts would fill the queue and have the rest of it refused, or wait for a reader who waits."""
    prompts = [f"prompt number {number}" for number in range(100)]
    with pipeline(ScriptedEngine(max_batch_size=2), max_pending=4, when_full=when_full) as pipe:
        assert [response.text for response in pipe(prompts)] == prompts
        assert [response.text for response in asyncio.run(pipe.async_batch_infer(prompts))] == prompts
        texts = dict.fromkeys(range(100), "")
        for part in pipe.stream_infer(prompts):
            texts[part.index] += part.text
        assert list(texts.values()) == prompts


def test_use_tqdm(pipe: Pipeline, alone: list[Response], capsys: pytest.CaptureFixture[str]) -> None:
    """use_tqdm shows how many prompts are done, and changes nothing else."""
    assert pipe(PROMPTS[0], gen_config=SHORT, use_tqdm=True) == alone[0]
    assert [r.text for r in pipe(PROMPTS, gen_config=SHORT, use_tqdm=True)] == [r.text for r in alone]
    shown = capsys.readouterr().err
    assert "1/1" in shown
    assert "3/3" in shown


def test_the_engine_configs() -> None:
    """session_len, the cache's share and thread_safe do what they say; a prompt that does not fit fails alone."""
    config = PytorchEngineConfig(session_len=32, cache_max_entry_count=0.05, max_batch_size=2, thread_safe=True)
    with pipeline("demo", backend_config=config) as pipe:
        long, short = pipe(["word " * 40, "Hi"])
        assert (long.finish_reason, long.error_code) == ("error", "context_length_exceeded")
        assert "32" in str(long.error_message)
        assert short.input_token_len + short.generate_token_len <= 32
    with pipeline("demo", TurbomindEngineConfig(session_len=64, tp=1)) as pipe:
        assert pipe("Hi").finish_reason == "stop"
    with pytest.raises(RuntimeError, match="closed"):
        pipe("Hi")


def test_chat_sessions(pipe: Pipeline) -> None:
    """A session carries the conversation from turn to turn, as messages by hand would."""
    session = pipe.chat("Hi", gen_config=SHORT)
    first = session.response.text
    assert pipe.chat("And then?", session=session, gen_config=SHORT) is session
    by_hand = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert session.response.text == pipe(by_hand, gen_config=SHORT).text
    assert session.history == [("Hi", first), ("And then?", session.response.text)]
    parts = list(pipe.chat("More", session=session, gen_config=SHORT, stream_response=True))
    assert "".join(part.text for part in parts) == session.response.text == session.history[2][1]
    assert "USER: \nMore" in str(session)


def test_a_turn_that_is_left_is_not_remembered(pipe: Pipeline) -> None:
    """Breaking off an answer leaves the conversation as it was, stops the engine, and frees the session."""
    session = pipe.session()
    for _part in pipe.chat("Tell me a story", session=session, stream_response=True):
        break
    assert session.history == []
    assert pipe.chat("Hi", session=session, gen_config=SHORT).history[0][0] == "Hi"


def test_threads(pipe: Pipeline, alone: list[Response]) -> None:
    """Sixteen threads on one pipeline each get the answer they get alone."""
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda prompt: pipe(prompt, gen_config=SHORT).text, PROMPTS * 16))
    assert texts == [r.text for r in alone] * 16


def test_async_batch_infer_on_the_callers_loop(pipe: Pipeline, alone: list[Response]) -> None:
    """The old page's recipe: tasks of a loop of one's own, one prompt or a list each."""

    async def gather() -> Any:
        tasks = [pipe.async_batch_infer(prompt, gen_config=SHORT) for prompt in (PROMPTS[0], PROMPTS[1:], "")]
        return await asyncio.gather(*tasks)

    one, several, empty = asyncio.run(gather())
    assert one == alone[0]
    assert [r.text for r in several] == [r.text for r in alone[1:]]
    assert empty.finish_reason == "error"


def test_async_batch_infer_on_the_engines_loop() -> None:
    """Called on the loop that runs the engine, where blocking would wait for itself, it works as well."""
    loops: list[asyncio.AbstractEventLoop] = []

    class Telling(ScriptedEngine):
        async def start(self) -> None:
            loops.append(asyncio.get_running_loop())
            await super().start()

    with pipeline(Telling) as pipe:
        future = asyncio.run_coroutine_threadsafe(pipe.async_batch_infer(["a b", "c"]), loops[0])
        assert [r.text for r in future.result(30)] == ["a b", "c"]


def test_cancelling_async_batch_infer_stops_the_engine() -> None:
    """A task that is cancelled leaves nothing running."""
    engine = ScriptedEngine(manual=True)

    async def cancel(pipe: Pipeline) -> None:
        task = asyncio.ensure_future(pipe.async_batch_infer(["a", "b"]))
        await asyncio.get_running_loop().run_in_executor(None, lambda: engine.wait_for(lambda e: e.active == 2))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with pipeline(engine) as pipe:
        asyncio.run(cancel(pipe))
        engine.wait_for(lambda e: len(e.aborted) == 2)


def test_an_aborted_session_says_so() -> None:
    """session.abort() from another thread ends the answer with what there was, and leaves other prompts alone."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe:
        sessions = [pipe.session(), pipe.session()]
        stream = pipe.stream_infer(["a b c", "d e"], sessions=sessions)
        engine.wait_for(lambda e: e.active == 2)
        engine.step()
        first = [next(stream), next(stream)]
        sessions[0].abort()
        engine.wait_for(lambda e: len(e.aborted) == 1)
        engine.step()
        rest = list(stream)
        assert {part.index: part.text for part in first} == {0: "a", 1: "d"}
        assert {part.index: part.finish_reason for part in rest if part.finish_reason} == {0: "abort", 1: "stop"}

        session = pipe.session()
        with ThreadPoolExecutor(1) as pool:
            turn = pool.submit(pipe.chat, "x y z", session)
            engine.wait_for(lambda e: e.active == 1)
            with pytest.raises(ValueError, match="running"):
                pipe.chat("meanwhile", session)
            session.abort()
            assert turn.result(30).response.finish_reason == "abort"


def test_streams_take_no_thread() -> None:
    """A server that streams lists to a hundred users would have a hundred threads more, and each its event loop."""
    with pipeline(ScriptedEngine(manual=True)) as pipe:
        before = set(threading.enumerate())
        streams = [pipe.stream_infer(["a", "b"]) for _ in range(3)]
        assert set(threading.enumerate()) <= before
        for stream in streams:
            stream.close()
