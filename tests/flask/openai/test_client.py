"""The official client, and curl, against the bundled model."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.flask.openai.conftest import PATIENCE, Served

FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture
def client(demo: Served) -> Any:
    with demo.client() as client:
        yield client


def test_chat(client: OpenAI) -> None:
    """A question is answered, with its tokens counted and why it ended."""
    answer = client.chat.completions.create(model="demo", messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "demo"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams(client: OpenAI) -> None:
    """The chunks join to the answer that the same request gives as a whole, and the counts come last."""
    whole = client.chat.completions.create(model="demo", messages=STORY, temperature=0)
    stream = client.chat.completions.create(
        model="demo", messages=STORY, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_parts_and_roles(client: OpenAI) -> None:
    """Contents in parts, a developer's message and earlier turns make one conversation."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "12 + 30 = 42."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Italy?"}],
        },
    ]
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert "Rome" in (answer.choices[0].message.content or "")


def test_sampling_is_per_request(client: OpenAI) -> None:
    """The same seed gives the same text, other seeds others; several answers to one request differ too."""

    def tell(seed: int, n: int = 1) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=STORY, temperature=1.5, seed=seed, n=n, max_tokens=30
        )
        return [choice.message.content for choice in answer.choices]

    assert tell(1) == tell(1) != tell(2)
    together = tell(1, 3)
    assert len(set(together)) == 3
    assert together[:2] == [*tell(1), *tell(2)]


def test_several_answers_stream(client: OpenAI) -> None:
    """With n, each chunk says which answer it belongs to, and every answer ends; the prompt is counted once."""
    options: dict[str, Any] = {"model": "demo", "messages": STORY, "seed": 4, "n": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    texts = ["", "", ""]
    reasons: list[str | None] = [None, None, None]
    usage = None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    single = client.chat.completions.create(**{**options, "n": 1})
    assert usage == whole.usage
    assert usage is not None
    assert single.usage is not None
    assert usage.prompt_tokens == single.usage.prompt_tokens
    assert usage.completion_tokens > single.usage.completion_tokens


def test_limits_and_stops(client: OpenAI) -> None:
    """Token limits by either name and stop words end an answer, and say so."""
    for name in ("max_tokens", "max_completion_tokens"):
        limits: dict[str, Any] = {name: 3}
        cut = client.chat.completions.create(model="demo", messages=STORY, temperature=0, **limits)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage is not None
        assert cut.usage.completion_tokens == 3
    stops: list[str | list[str]] = ["fox", ["nowhere", "fox"]]
    for stop in stops:
        stopped = client.chat.completions.create(model="demo", messages=STORY, temperature=0, stop=stop)
        assert stopped.choices[0].finish_reason == "stop"
        assert "fox" not in (stopped.choices[0].message.content or "")


def test_extensions(client: OpenAI) -> None:
    """What vLLM's users send by extra_body works too: the most likely token alone is the greedy answer."""
    greedy = client.chat.completions.create(model="demo", messages=STORY, temperature=0, max_tokens=20)
    top = client.chat.completions.create(
        model="demo", messages=STORY, temperature=2, max_tokens=20, extra_body={"top_k": 1, "unknown": "ignored"}
    )
    longer = client.chat.completions.create(
        model="demo", messages=FRANCE, temperature=0, max_tokens=30, extra_body={"ignore_eos": True}
    )
    assert top.choices[0].message.content == greedy.choices[0].message.content
    assert longer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: OpenAI, stream: bool) -> None:
    """Each token has its log-probability and those of the likeliest; the tokens join to the text."""
    options: dict[str, Any] = {
        "model": "demo",
        "messages": FRANCE,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        places = [place for chunk in chunks if chunk.logprobs for place in chunk.logprobs.content or []]
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text = choice.message.content or ""
        assert choice.logprobs is not None
        places = choice.logprobs.content or []
    assert "".join(place.token for place in places) == text
    assert all(len(place.top_logprobs) == 3 for place in places)
    assert all(place.logprob == place.top_logprobs[0].logprob <= 0 for place in places)
    assert all(bytes(place.bytes or []).decode() == place.token for place in places)
    assert math.exp(places[0].logprob) > 0.5


def test_completions(client: OpenAI) -> None:
    """Texts go to the model as they are; without a limit a completion has 16 tokens."""
    answer = client.completions.create(model="demo", prompt=STORY_TEXT, temperature=0, logprobs=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert (logprobs.text_offset or [])[:2] == [0, len((logprobs.tokens or [""])[0])]
    echoed = client.completions.create(model="demo", prompt=STORY_TEXT, temperature=0, echo=True)
    assert echoed.choices[0].text == STORY_TEXT + answer.choices[0].text


STORY_TEXT = "<|user|>Tell me a story about a fox.<|end|><|assistant|>"


def test_many_completions(client: OpenAI) -> None:
    """A list of prompts gives their answers in its order, streaming or not."""
    prompts = [f"<|user|>What is {n} + {n}?<|end|><|assistant|>" for n in (3, 11, 20)]
    answer = client.completions.create(model="demo", prompt=prompts, temperature=0)
    assert [choice.text for choice in answer.choices] == ["3 + 3 = 6.", "11 + 11 = 22.", "20 + 20 = 40."]
    texts = ["", "", ""]
    for chunk in client.completions.create(model="demo", prompt=prompts, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_token_ids_as_a_prompt(client: OpenAI) -> None:
    """A prompt of token ids is answered; ids that the model does not have are the client's fault."""
    assert client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=2).choices[0].text is not None
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[5, 10**6])
    assert caught.value.param == "prompt"


def test_models(client: OpenAI) -> None:
    """The models are listed, shown by name, and what is not there is not found."""
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").created > 10**9
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("nobody/nothing")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_too_long(client: OpenAI, stream: bool) -> None:
    """A prompt that does not fit is refused with its own code, before a stream has begun too."""
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "word " * 2000}], stream=stream
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "This model's maximum context length is" in caught.value.message  # litellm, for one, knows it by these words
    assert "1024" in caught.value.message


def test_errors_are_the_clients_classes(client: OpenAI) -> None:
    """Faults come as the exceptions that users of the client catch, in the words they used."""
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=FRANCE, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)
    assert missing.value.code == "model_not_found"
    with pytest.raises(APIStatusError) as template:
        client.chat.completions.create(model="demo", messages=[{"role": "function", "content": "x", "name": "f"}])
    assert template.value.status_code == 400


def test_async_client(demo: Served) -> None:
    """The async client, many at once on one loop."""

    async def ask(client: AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"What is {number} + {number}?"}],
            temperature=0, stream=True,
        )  # fmt: skip
        async with stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=demo.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
            return await asyncio.gather(*[ask(client, number) for number in range(10, 20)])

    answers = asyncio.run(main())
    assert all(text.startswith(f"{n} + {n} = ") for n, text in zip(range(10, 20), answers, strict=True)), answers


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(demo: Served) -> None:
    """``curl -N`` shows events as lines of data that end with [DONE]."""
    body = {"model": "demo", "messages": FRANCE, "stream": True, "temperature": 0}
    command = ["curl", "-sSN", "-i", f"{demo.url}/chat/completions", "-d", json.dumps(body)]
    command += ["-H", "Content-Type: application/json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    head, _, events = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert "200" in head.splitlines()[0]
    assert "content-type: text/event-stream" in head.lower()
    lines = [line for line in events.splitlines() if line]
    assert all(line.startswith((":", "data: ")) for line in lines)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item)["choices"][0] for item in data[:-1]]
    assert "Paris" in "".join(chunk["delta"].get("content", "") for chunk in chunks)
