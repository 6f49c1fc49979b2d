"""Calls of functions and reasoning, as the official client reads them, from an engine that says what it is told."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, LengthFinishReasonError, OpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel, Field

from lmbridge import Delta
from lmbridge.messages import Request, ToolCall
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import Served


class Weather(BaseModel):
    """The weather of a city."""

    city: str


TOOLS: Any = [pydantic_function_tool(Weather)]
ASKED: Any = [{"role": "user", "content": "How is the weather in Paris and Rome?"}]
REASONING, TEXT = "They want two cities.", "I look it up."
ARGUMENTS = ['{"city": "Paris"}', '{"city": "Rome"}']
SAID = [
    *(Delta(reasoning=piece) for piece in ("They want ", "two cities.")),
    *(Delta(piece) for piece in ("I look ", "it up.")),
    Delta(tool_calls=[ToolCall(0, "call_a", "Weather", '{"city":')]),
    Delta(tool_calls=[ToolCall(0, arguments=' "Paris"}')]),
    Delta(tool_calls=[ToolCall(1, "call_b", "Weather", '{"city": "Rome"}')]),
]


class Played:
    """A server whose engine plays ``said``, and what it was asked."""

    def __init__(self, serve: Callable[..., Served]) -> None:
        self.said: list[str | Delta] = list(SAID)
        self.answer: Callable[[Request], list[str | Delta]] = lambda request: self.said
        self.asked: list[Request] = []
        self.served = serve(ScriptedEngine(self._script))

    @property
    def read(self) -> Any:
        """The conversation that came last."""
        return self.asked[-1].prompt

    def _script(self, request: Request) -> list[str | Delta]:
        self.asked.append(request)
        return self.answer(request)


@pytest.fixture
def played(served: Callable[..., Served]) -> Played:
    return Played(served)


@pytest.fixture
def client(played: Played) -> Iterator[OpenAI]:
    with played.served.client() as client:
        yield client


def create(client: OpenAI, **fields: Any) -> Any:
    fields = {"model": "scripted", "messages": ASKED, "tools": TOOLS, **fields}
    return client.chat.completions.create(**fields)


def test_calls(client: OpenAI) -> None:
    """Users of the client find the calls, their JSON text, why the answer ended, and what the model thought."""
    choice = create(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", TEXT)
    assert [(call.id, call.type, call.function.name) for call in choice.message.tool_calls] == [
        ("call_a", "function", "Weather"),
        ("call_b", "function", "Weather"),
    ]
    assert [call.function.arguments for call in choice.message.tool_calls] == ARGUMENTS
    assert choice.message.reasoning_content == REASONING


def test_what_was_not_said_is_not_there(client: OpenAI, played: Played) -> None:
    """Calls alone have content null, as OpenAI's; an answer in words has no list of calls and no reasoning."""
    played.said = list(SAID[4:])
    alone = create(client).choices[0].message
    assert (alone.content, len(alone.tool_calls)) == (None, 2)
    played.said = ["Hello"]
    words = create(client).choices[0]
    assert (words.finish_reason, words.message.content, words.message.tool_calls) == ("stop", "Hello", None)
    assert "reasoning_content" not in words.message.model_extra
    played.said = [Delta(reasoning="Hm."), "Hello"]
    assert create(client, max_tokens=1).choices[0].message.content == ""


def test_a_stream_says_what_the_answer_says(client: OpenAI) -> None:
    """A client's own joining of the deltas gives the whole answer: names come once, arguments in pieces."""
    text = reasoning = ""
    calls: dict[int, dict[str, Any]] = {}
    deltas = []
    for chunk in create(client, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            deltas.append(choice.delta)
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for piece in choice.delta.tool_calls or ():
                new = {"id": piece.id, "name": piece.function.name, "arguments": ""}
                call = calls.setdefault(piece.index, new)
                call["arguments"] += piece.function.arguments
            ended = choice.finish_reason
    assert (text, reasoning, ended) == (TEXT, REASONING, "tool_calls")
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert [calls[place] for place in sorted(calls)] == [
        {"id": "call_a", "name": "Weather", "arguments": ARGUMENTS[0]},
        {"id": "call_b", "name": "Weather", "arguments": ARGUMENTS[1]},
    ]
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == len(SAID)


def test_the_clients_own_stream(client: OpenAI) -> None:
    """Its helper tells of each call's arguments as they come, parses them by the class, and ends with the answer."""
    with client.chat.completions.stream(model="scripted", messages=ASKED, tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    done: list[Any] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [Weather(city="Paris"), Weather(city="Rome")]
    told: list[Any] = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in told if event.index == 0) == ARGUMENTS[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", TEXT)
    assert [call.function.parsed_arguments for call in final.message.tool_calls or ()] == [
        Weather(city="Paris"),
        Weather(city="Rome"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_as_objects(client: OpenAI, played: Played, stream: bool) -> None:
    """``parse`` gives objects of the class; a call that is cut off is the client's own error for that."""
    ask: dict[str, Any] = {"model": "scripted", "messages": ASKED, "tools": TOOLS}

    def parsed(**fields: Any) -> Any:
        if not stream:
            return client.chat.completions.parse(**ask, **fields)
        with client.chat.completions.stream(**ask, **fields) as events:
            return events.get_final_completion()

    calls = parsed().choices[0].message.tool_calls
    assert [call.function.parsed_arguments for call in calls] == [Weather(city="Paris"), Weather(city="Rome")]
    with pytest.raises(LengthFinishReasonError):
        parsed(max_tokens=5)
    assert played.asked[0].config.calling is not None


def test_several_choices(client: OpenAI) -> None:
    """Each of n answers has its own calls, whole and in a stream whose chunks mix."""
    whole = create(client, n=2)
    assert [[call.function.arguments for call in choice.message.tool_calls] for choice in whole.choices] == [
        ARGUMENTS,
        ARGUMENTS,
    ]
    with client.chat.completions.stream(model="scripted", messages=ASKED, tools=TOOLS, n=2) as stream:
        for choice in stream.get_final_completion().choices:
            calls = choice.message.tool_calls or ()
            assert [call.function.arguments for call in calls] == ARGUMENTS
            assert choice.message.content == TEXT


def test_a_conversation_with_results(client: OpenAI, played: Played) -> None:
    """The answer goes back as it came, with the results: the model reads calls, ids and what it thought."""
    message = create(client).choices[0].message
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
        for call in message.tool_calls
    ]
    played.said = ["It rains ", "in both."]
    assert create(client, messages=[*ASKED, message, *results]).choices[0].message.content == "It rains in both."
    user, assistant, *told = played.read
    assert user == ASKED[0]
    assert assistant == {
        "role": "assistant",
        "content": TEXT,
        "reasoning_content": REASONING,
        "tool_calls": [call.model_dump() for call in message.tool_calls],
    }
    assert told == [{"role": "tool", "content": "Rain.", "tool_call_id": name} for name in ("call_a", "call_b")]


def test_a_streams_message_goes_back(client: OpenAI, played: Played) -> None:
    """What the client's helper makes of a stream is a message that the next request takes."""
    played.said = list(SAID[4:])
    with client.chat.completions.stream(model="scripted", messages=ASKED, tools=TOOLS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content is None
    played.said = ["Fine."]
    results: Any = [{"role": "tool", "tool_call_id": name, "content": "Sun."} for name in ("call_a", "call_b")]
    create(client, messages=[*ASKED, message, *results])
    calls = played.read[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ARGUMENTS


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_may_be_left_out(client: OpenAI, stream: bool) -> None:
    """include_reasoning false: not a word of it, and the rest as it was, its tokens counted."""
    hidden = {"include_reasoning": False, "return_token_ids": True}
    if stream:
        chunks = list(create(client, stream=True, stream_options={"include_usage": True}, extra_body=hidden))
        assert "two cities" not in "".join(chunk.model_dump_json() for chunk in chunks)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        ids = [token for chunk in chunks for choice in chunk.choices for token in choice.model_extra["token_ids"]]
        usage = chunks[-1].usage
    else:
        answer = create(client, extra_body=hidden)
        assert "two cities" not in answer.model_dump_json()
        text, ids, usage = answer.choices[0].message.content, answer.choices[0].token_ids, answer.usage
    assert (text, ids, usage.completion_tokens) == (TEXT, list(range(1, len(SAID) + 1)), len(SAID))
    assert 0 < usage.completion_tokens_details.reasoning_tokens < len(SAID)


def test_tokens_of_reasoning(client: OpenAI, played: Played) -> None:
    """They are counted as OpenAI counts them, of all answers together, and not told where nothing was thought."""
    counted: Any = {"stream": True, "stream_options": {"include_usage": True}}
    for n in (1, 2):
        whole = create(client, n=n, max_tokens=2).usage
        *_, last = create(client, n=n, max_tokens=2, **counted)
        for usage in (whole, last.usage):
            assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens == 2 * n
    played.said = ["Fine."]
    *_, last = create(client, **counted)
    assert create(client).usage.completion_tokens_details is last.usage.completion_tokens_details is None


def test_reasoning_is_told_apart_in_chats_alone(client: OpenAI, played: Played) -> None:
    """A completion goes on with a text: what stands in it is nobody's thought."""
    create(client)
    client.completions.create(model="scripted", prompt="x")
    assert [request.config.separate_reasoning for request in played.asked] == [True, False]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [*ASKED, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ],
)
def test_what_is_refused(client: OpenAI, played: Played, fields: dict[str, Any], param: str) -> None:
    """A 400 that names the place, before anything reaches the model."""
    with pytest.raises(BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.param == param
    assert played.asked == []


def test_json_beside_tools(client: OpenAI, played: Played) -> None:
    """A form of the answer and tools that may be called go together, as clients with both send them."""
    played.said = [json.dumps({"city": "Paris"})]
    answer = client.chat.completions.parse(
        model="scripted", messages=ASKED, tools=TOOLS, response_format=Weather, parallel_tool_calls=False
    )
    assert answer.choices[0].message.parsed == Weather(city="Paris")
    config = played.asked[0].config
    assert config.form is not None
    assert config.calling is not None
    assert not config.calling.parallel


def test_the_documentations_examples(client: OpenAI, played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever copies them from the page has a loop that calls the function and ends with the answer."""
    page = (Path(__file__).parents[3] / "docs" / "http" / "openai.rst").read_text()
    calling, thinking = re.findall(r"code-block:: python\n.*\n\n((?:   .*\n|\n)+)", page.split("\nTools\n---")[1])

    def answer(request: Request) -> list[str | Delta]:
        last = request.prompt[-1]
        if isinstance(last, dict) and last["role"] == "tool":
            return [last["content"]]
        if request.config.tools is None:
            return [Delta(reasoning="7 * 13."), "No."]
        return [Delta(tool_calls=[ToolCall(0, "a", "weather", ARGUMENTS[0])])]

    played.answer = answer
    exec(textwrap.dedent(calling + thinking).replace('"qwen"', '"scripted"'), {"client": client})
    assert capsys.readouterr().out == "It rains in Paris.\n7 * 13. No.\n"


class Place(BaseModel):
    name: str = Field(max_length=8)


def test_a_model_that_must_call_does(demo: Served) -> None:
    """With the bundled model: a call that the client's class takes, in pieces too; to let it choose is a 400."""
    ask: dict[str, Any] = {"model": "demo", "messages": ASKED, "tools": [pydantic_function_tool(Place)]}
    with demo.client() as client:
        whole = client.chat.completions.parse(**ask, tool_choice="required", seed=1).choices[0]
        with client.chat.completions.stream(**ask, tool_choice="required", seed=1) as stream:
            streamed = stream.get_final_completion().choices[0]
        for choice in (whole, streamed):
            calls = choice.message.tool_calls or []
            assert isinstance(calls[0].function.parsed_arguments, Place)
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(**ask)
        assert caught.value.param == "tools"


def test_a_call_is_the_clients_type(client: OpenAI) -> None:
    """Calls are functions to users who look at their types."""
    calls = create(client).choices[0].message.tool_calls
    assert all(isinstance(call, ChatCompletionMessageFunctionToolCall) for call in calls)
