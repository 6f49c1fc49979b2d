"""Answers as JSON: what OpenAI's own types read out of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lmbridge import Delta, Response, Timings, Usage
from lmbridge.flask.openai.logprobs import UNLIKELY, ChatLogprobs, CompletionLogprobs, TokenTexts
from lmbridge.flask.openai.writing import ChatWriter, CompletionWriter, Writer, parted, total_usage
from lmbridge.messages import PromptLogprobs, ToolCall, join_deltas

TEXTS = {1: "He", 2: "llo", 3: "\N{REPLACEMENT CHARACTER}", 4: ""}
ENTRIES = [{1: -0.5, 2: -1.0}, {2: -2.0, 1: -0.25, 3: -math.inf}, {4: -3.0}]


def token_texts() -> TokenTexts:
    return TokenTexts(lambda token_ids: [TEXTS[token] for token in token_ids])


def response(text: str, usage: Usage | None = None) -> Response:
    return Response(text, [], "stop", usage or Usage(3, 4), Timings(), ENTRIES)


def streamed(writer: Writer, deltas: list[Delta], index: int = 0) -> list[str]:
    chunks = [writer.chunk(index, delta) for delta in deltas]
    return [chunk for chunk in chunks if chunk is not None]


@given(st.lists(st.text()), st.text(), st.integers(0, 3))
def test_chat_chunks_join_to_the_text(texts: list[str], model: str, index: int) -> None:
    """Whatever the model says, newlines and quotes too, each chunk is one line of JSON and they join to the text."""
    writer = ChatWriter("a1", 7, model)
    chunks = streamed(writer, [Delta(text) for text in texts] + [Delta(finish_reason="length")], index)
    assert all("\n" not in chunk and "\r" not in chunk for chunk in chunks)
    read = [ChatCompletionChunk.model_validate_json(chunk) for chunk in chunks]
    choices = [chunk.choices[0] for chunk in read]
    assert "".join(choice.delta.content or "" for choice in choices) == "".join(texts)
    assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert {(c.id, c.created, c.model, c.object) for c in read} == {("chatcmpl-a1", 7, model, "chat.completion.chunk")}
    assert {choice.index for choice in choices} == {index}


@given(st.lists(st.text(), min_size=1), st.text())
def test_completion_chunks_begin_with_the_echo(texts: list[str], echo: str) -> None:
    """An echoed prompt stands once, before the first text of its answer."""
    writer = CompletionWriter("a1", 7, "demo", echo=["", echo].__getitem__)
    chunks = streamed(writer, [Delta(text) for text in texts], 1)
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == echo + "".join(texts)


def test_only_what_can_be_seen_is_sent() -> None:
    """A delta that says nothing sends no chunk, and a chunk without text has no content that clients would join."""
    writer = ChatWriter("a1", 7, "demo")
    chunks = streamed(writer, [Delta(), Delta(), Delta("x"), Delta(), Delta(finish_reason="stop")])
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "x"}, {}]
    (empty,) = streamed(ChatWriter("a1", 7, "demo"), [Delta(), Delta(finish_reason="stop")])
    assert json.loads(empty)["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_a_call_comes_in_pieces_and_is_complete_before_the_end() -> None:
    """As OpenAI sends them: who joins by index and waits for the chunk after a call to run it has all of it."""
    writer = ChatWriter("a1", 7, "demo")
    last = Delta(tool_calls=[ToolCall(0, arguments="1}"), ToolCall(1, "b", "g")], finish_reason="tool_calls")
    said = [
        Delta(reasoning="Hm."),
        Delta("I ", reasoning="So."),
        Delta(tool_calls=[ToolCall(0, "a", "f"), ToolCall(0, arguments='{"x": ')]),
        *parted(last),
    ]
    choices = [json.loads(chunk)["choices"][0] for chunk in streamed(writer, said)]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": None, "reasoning_content": "Hm."},
        {"content": "I ", "reasoning_content": "So."},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": "1}"}},
                {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
            ]
        },
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "tool_calls"]


@pytest.mark.parametrize("form", [None, ChatLogprobs(token_texts(), 1)])
def test_tokens_of_calls_have_their_probabilities(form: ChatLogprobs | None) -> None:
    """Token ids and log-probabilities are of all that was generated, whatever became of it."""
    writer = ChatWriter("a1", 7, "demo", form, token_ids=True)
    entries = None if form is None else ENTRIES[:2]
    calls = Delta("", [1, 2], entries, "tool_calls", tool_calls=[ToolCall(0, "a", "f", "{}")])
    choices = [
        json.loads(chunk)["choices"][0] for chunk in streamed(writer, [Delta(prompt_token_ids=[5]), *parted(calls)])
    ]
    assert [choice["token_ids"] for choice in choices] == [[], [1, 2], []]
    told = [len(choice["logprobs"]["content"]) if choice["logprobs"] else 0 for choice in choices]
    assert told == [0, 0 if form is None else 2, 0]


def test_counts_come_in_a_chunk_without_choices() -> None:
    """With include_usage every chunk has ``usage``: null, but for the last, which has no choices."""
    writer = ChatWriter("a1", 7, "demo", usage=True)
    assert json.loads(streamed(writer, [Delta("x")])[0])["usage"] is None
    last = ChatCompletionChunk.model_validate_json(writer.counts(Usage(3, 4)))
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 4, 7)


def test_a_prompt_is_counted_once() -> None:
    """Two answers to each of two prompts: four answers' tokens, two prompts' tokens."""
    usages = [Usage(10, 1), Usage(10, 2), Usage(5, 3), Usage(5, 4)]
    assert total_usage([response("", usage) for usage in usages], 2) == Usage(15, 10)


def test_whole_chat() -> None:
    """OpenAI's own type reads a whole answer with its log-probabilities."""
    writer = ChatWriter("a1", 7, "demo", ChatLogprobs(token_texts(), 1))
    read = ChatCompletion.model_validate_json(
        json.dumps(writer.whole([response("Hello")], Usage(3, 4)), allow_nan=False)
    )
    assert read.choices[0].message.content == "Hello"
    assert read.choices[0].logprobs is not None
    places = read.choices[0].logprobs.content or []
    assert [(place.token, place.logprob) for place in places] == [("He", -0.5), ("llo", -2.0), ("token_id:4", -3.0)]
    assert [[top.token for top in place.top_logprobs] for place in places] == [["He"], ["He"], ["token_id:4"]]
    assert places[0].bytes == [72, 101]


def test_whole_completion() -> None:
    """OpenAI's own type reads a whole completion, its echo first."""
    writer = CompletionWriter("a1", 7, "demo", CompletionLogprobs(token_texts(), 1), echo=["Say: "].__getitem__)
    read = Completion.model_validate_json(json.dumps(writer.whole([response("Hello")], Usage(3, 4)), allow_nan=False))
    assert (read.id, read.object, read.choices[0].text) == ("cmpl-a1", "text_completion", "Say: Hello")
    assert read.choices[0].logprobs is not None
    assert read.choices[0].logprobs.text_offset == [0, 2, 5]


PROMPT_ENTRIES: PromptLogprobs = [None, {2: -1.5, 1: -0.5}]


def scored_delta(index: int) -> Delta:
    delta = Delta("xyz"[index], [index + 1], [ENTRIES[index]], "length" if index == 2 else None)
    return delta if index else replace(delta, prompt_token_ids=[1, 2], prompt_logprobs=PROMPT_ENTRIES)


@pytest.mark.parametrize("token_ids", [False, True])
def test_an_echo_with_logprobs_streams_as_it_is_whole(token_ids: bool) -> None:
    """The prompt's tokens come first and once, the first of them with null; the offsets go on through the answer."""

    def writer() -> CompletionWriter:
        form = CompletionLogprobs(token_texts(), 1)
        return CompletionWriter("a1", 7, "demo", form, echo=["Hello"].__getitem__, token_ids=token_ids)

    joined = join_deltas([scored_delta(index) for index in range(3)])
    said = replace(
        response(joined.text), token_ids=joined.token_ids, prompt_token_ids=[1, 2], prompt_logprobs=PROMPT_ENTRIES
    )
    whole = writer().whole([said], Usage(2, 3))["choices"][0]
    chunks = [json.loads(chunk)["choices"][0] for chunk in streamed(writer(), [scored_delta(i) for i in range(3)])]
    assert whole["text"] == "Helloxyz" == "".join(chunk["text"] for chunk in chunks)
    assert whole["logprobs"]["tokens"] == ["He", "llo", "He", "llo", "token_id:4"]
    assert whole["logprobs"]["token_logprobs"] == [None, -1.5, -0.5, -2.0, -3.0]
    assert whole["logprobs"]["top_logprobs"][:2] == [None, {"He": -0.5, "llo": -1.5}]
    assert whole["logprobs"]["text_offset"] == [0, 2, 5, 7, 10]
    for name, values in whole["logprobs"].items():
        assert values == [value for chunk in chunks for value in chunk["logprobs"][name]]
    ids = [chunk.get("token_ids") for chunk in chunks]
    assert (whole.get("token_ids"), ids) == (([1, 2, 3], [[1], [2], [3]]) if token_ids else (None, [None] * 3))
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[1, 2] if token_ids else None, None, None]


def test_a_chats_token_ids() -> None:
    """The prompt's stand beside the choices, in a stream with each choice's first chunk; the answer's in its choice."""
    writer = ChatWriter("a1", 7, "demo", token_ids=True)
    whole = writer.whole([replace(response("x"), token_ids=[3], prompt_token_ids=[1, 2])], Usage(2, 1))
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == ([1, 2], [3])
    deltas = [Delta("x", [3], prompt_token_ids=[1, 2]), Delta("", [4]), Delta(finish_reason="stop")]
    chunks = [json.loads(chunk) for chunk in streamed(writer, deltas)]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[1, 2], None, None]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[3], [4], []]


def test_tokens_as_ids() -> None:
    """Tokens whose texts are no text of their own can be told apart by their ids."""
    texts = TokenTexts(lambda token_ids: [TEXTS[token] for token in token_ids], as_ids=True)
    rendered = CompletionLogprobs(texts, 1).render(0, ENTRIES[:1])
    assert rendered["tokens"] == ["token_id:1"]
    assert rendered["token_texts"] == {"token_id:1": "He", "token_id:2": "llo"}
    (place,) = ChatLogprobs(texts, 1).render(0, ENTRIES[:1])["content"]
    assert (place["token"], place["bytes"]) == ("token_id:1", list(b"He"))  # which say what stands there


def test_a_token_whose_text_is_not_known_has_no_bytes() -> None:
    """The bytes of the words that stand for it would be taken for its own."""
    (place,) = ChatLogprobs(token_texts(), 0).render(0, ENTRIES[2:])["content"]
    assert (place["token"], place["bytes"]) == ("token_id:4", None)


def test_part_of_a_character_has_no_bytes() -> None:
    """A token that is part of a character shows U+FFFD, whose bytes would be wrong ones."""
    place = ChatLogprobs(token_texts(), 0).render(0, [{3: -math.inf}])["content"][0]
    assert place == {"token": "\N{REPLACEMENT CHARACTER}", "logprob": UNLIKELY, "bytes": None, "top_logprobs": []}


def test_completion_logprobs_go_on_where_they_were() -> None:
    """The offsets of a stream's later tokens go on from its earlier ones, per answer."""
    form = CompletionLogprobs(token_texts(), 2)
    assert form.render(0, ENTRIES[:1])["text_offset"] == [0]
    assert form.render(1, ENTRIES[:1])["text_offset"] == [0]
    rendered = form.render(0, ENTRIES[1:])
    assert rendered["text_offset"] == [2, 5]
    assert rendered["tokens"] == ["llo", "token_id:4"]
    assert rendered["token_logprobs"] == [-2.0, -3.0]
    assert rendered["top_logprobs"][0] == {"He": -0.25, "llo": -2.0, "\N{REPLACEMENT CHARACTER}": UNLIKELY}
