"""The official client asks, whole and in streams, and gets what its users expect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from lmbridge.messages import Delta
from tests.flask.openai.conftest import PATIENCE
from tests.flask.openai.responses.conftest import ANSWERS, Api
from tests.flask.openai.responses.strict import check_response

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
SAID = [name for name in ANSWERS if name != "Likely"]


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str


def test_a_text(client: OpenAI) -> None:
    """The commonest use of all: a string in, a string out, and what it has cost."""
    answer = client.responses.create(model="scripted", input="Hello", metadata={"of": "me"}, temperature=0.5)
    assert (answer.output_text, answer.status, answer.metadata) == ("Good day", "completed", {"of": "me"})
    assert answer.temperature == 0.5
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (1, 2, 3)


@pytest.mark.parametrize("said", SAID)
def test_answers_are_what_the_types_say(api: Api, said: str) -> None:
    """Clients of languages that check types read every answer."""
    format = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    given = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "reasoning": {"effort": "low", "summary": "auto"},
        "tools": [WEATHER], "tool_choice": "auto", "user": "me", "max_output_tokens": 50, "store": True,
        "text": {"format": format, "verbosity": "low"}, "truncation": "auto", "parallel_tool_calls": False,
    }  # fmt: skip
    for fields in ({}, given):
        value = api.post(input=said, **fields)
        answer = check_response(value)
        assert answer.status == "completed"
        assert value["store"] is False
        assert answer.instructions == fields.get("instructions")
        expected = {"weather"} if fields else set()
        assert {tool.name for tool in answer.tools if tool.type == "function"} == expected


def test_items_of_an_answer(api: Api) -> None:
    """What the model thinks, says and calls comes apart, in that order; a call is known by the engine's id for it."""
    thought, said = api.post(input="Think")["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert said["content"] == [{"type": "output_text", "text": "It is so.", "annotations": [], "logprobs": []}]
    kinds = [item["type"] for item in api.post(input="Weather?")["output"]]
    assert kinds == ["reasoning", "function_call", "function_call"]
    said, call = api.post(input="Both")["output"]
    assert (said["type"], call["call_id"], call["name"], call["arguments"]) == (
        "message", "call_a", "weather", '{"city": "Rome"}',
    )  # fmt: skip


def test_an_answer_without_a_word(api: Api) -> None:
    """A model that ends its answer at once has said "": clients that look for a message find one."""
    for said in ("Nothing", "Only thoughts"):
        message = api.post(input=said)["output"][-1]
        assert (message["type"], message["content"][0]["text"]) == ("message", "")


def test_reasoning_may_be_left_out(api: Api) -> None:
    """Who has no use for it does not get it, and still learns how many tokens it took."""
    answer = api.post(input="Think", include_reasoning=False)
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_a_cut_answer_is_incomplete(api: Api) -> None:
    """A limit that was reached is told as OpenAI tells it."""
    answer = check_response(api.post(input="Hello", max_output_tokens=1))
    assert (answer.status, answer.output_text) == ("incomplete", "Good")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_a_class(client: OpenAI) -> None:
    """The client's own way from a class to an object of it, whole and streamed."""
    parsed = client.responses.parse(model="scripted", input="Person", text_format=Person)
    assert parsed.output_parsed == Person(name="Ann", age=7)
    with client.responses.stream(model="scripted", input="Person", text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == Person(name="Ann", age=7)


def test_the_form_reaches_the_engine(api: Api) -> None:
    """A schema that only the client knew would promise what nobody keeps."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    api.post(input="Person", text={"format": {"type": "json_schema", "name": "p", "schema": schema}})
    form = api.script.last.config.form
    assert form is not None
    assert form.value == schema


def test_a_stream(client: OpenAI) -> None:
    """Texts come as deltas, and the last event has the whole answer."""
    events = list(client.responses.create(model="scripted", input="Hello", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Good day"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Good day"


@pytest.mark.parametrize("said", SAID)
def test_the_clients_stream_helper(api: Api, client: OpenAI, said: str) -> None:
    """The helper joins events into the answer that there is without a stream, but for ids."""
    with client.responses.stream(model="scripted", input=said, tools=[WEATHER]) as stream:
        streamed = stream.get_final_response()
    whole = client.responses.create(model="scripted", input=said, tools=[WEATHER])
    left = {"id", "parsed", "parsed_arguments"}

    def told(answer: Any) -> Any:
        items = [item.to_dict() for item in answer.output]
        for part in [part for item in items for part in item.get("content", [])]:
            part.pop("parsed", None)
        return [{name: value for name, value in item.items() if name not in left} for item in items]

    assert told(streamed) == told(whole)
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.total_tokens == whole.usage.total_tokens


def test_tools_round_trip(api: Api, client: OpenAI) -> None:
    """An agent's loop: the calls, their outputs, the answer; the model reads its own turn as it was."""
    asked: list[Any] = [{"role": "user", "content": "Weather?"}]
    answer = client.responses.create(model="scripted", input=asked, tools=[WEATHER], instructions="Help.")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Rome", "Oslo"]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    items: list[Any] = [*asked, *answer.output, *outputs]
    assert client.responses.create(model="scripted", input=items, tools=[WEATHER], instructions="Help.").output_text
    request = api.script.last
    call_of = [{"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
               for call in calls]  # fmt: skip
    assert request.prompt == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "I must look.", "tool_calls": call_of},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_a"},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_b"},
    ]
    assert request.config.tools == [{"type": "function", "function": {
        name: WEATHER[name] for name in ("name", "description", "parameters", "strict")
    }}]  # fmt: skip


def test_tools_of_a_class(client: OpenAI) -> None:
    """The client's helper writes chats' tools; its flat form for this API is parsed into objects of the class."""
    nested = pydantic_function_tool(Weather, name="weather")["function"]
    parsed = client.responses.parse(model="scripted", input="Both", tools=[{"type": "function", **nested}])  # type: ignore
    call = parsed.output[-1]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Rome"}


def test_the_async_client(api: Api) -> None:
    """The async client streams as well, several at once."""

    async def ask(client: AsyncOpenAI) -> str:
        async with await client.responses.create(model="scripted", input="Hello", stream=True) as stream:
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    async def main() -> list[str]:
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        async with AsyncOpenAI(base_url=api.served.url, **options) as client:
            return await asyncio.gather(*[ask(client) for _ in range(4)])

    assert asyncio.run(main()) == ["Good day"] * 4


def test_nothing_is_kept(client: OpenAI) -> None:
    """Who asks for an answer of before hears why there is none, and what to do."""
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(NotFoundError, match=r"does not store responses.*whole conversation"):
            ask("resp_1")
    with pytest.raises(NotFoundError, match="does not store responses"):
        list(client.responses.input_items.list("resp_1"))
    for fields in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"background": True}):
        with pytest.raises(BadRequestError, match="this server stores no") as caught:
            client.responses.create(model="scripted", input="Hello", **fields)
        assert caught.value.param == next(iter(fields))


def test_fields_reach_the_engine(api: Api) -> None:
    """What chats can be asked for works here by the same names, and OpenAI's own by theirs."""
    api.post(
        input="Hello", temperature=0.5, top_p=0.25, max_output_tokens=9, top_k=3, min_p=0.1, seed=4, stop=["x"],
        repetition_penalty=1.5, reasoning={"effort": "high", "summary": "auto"}, top_logprobs=2,
        chat_template_kwargs={"enable_thinking": True}, tools=[WEATHER], parallel_tool_calls=False,
        tool_choice={"type": "function", "name": "weather"}, include=["reasoning.encrypted_content"],
    )  # fmt: skip
    config = api.script.last.config
    assert (config.temperature, config.top_p, config.max_new_tokens, config.top_k) == (0.5, 0.25, 9, 3)
    assert (config.min_p, config.random_seed, config.stop_words, config.repetition_penalty) == (0.1, 4, ["x"], 1.5)
    assert config.chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "high"}
    assert (config.logprobs, config.parallel_tool_calls, config.separate_reasoning) == (2, False, True)
    assert config.tool_choice == {"type": "function", "function": {"name": "weather"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    assert check_response(api.post(input="Hello", tools=[WEATHER], tool_choice=allowed)).tool_choice
    calling = api.script.last.config.calling
    assert calling is not None
    assert calling.required
    api.post(input="Hello", structured_outputs={"choice": ["a", "b"]}, include=["message.output_text.logprobs"])
    assert api.script.last.config.grammar == {"choice": ["a", "b"]}
    assert api.script.last.config.logprobs == 0


def test_log_probabilities(api: Api) -> None:
    """They are those of the message's text."""
    answer = check_response(api.post(input="Likely", top_logprobs=1))
    message = answer.output[-1]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [entry.logprob for entry in part.logprobs][-2:] == [-0.25, -1.5]
    assert [len(entry.top_logprobs) for entry in part.logprobs][-2:] == [1, 1]
    assert ANSWERS["Likely"][0] == Delta(reasoning="Hm.", logprobs=[{3: -0.5}])
