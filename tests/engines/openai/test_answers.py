"""What the far end says arrives whole: texts, thoughts, calls, tokens, probabilities, counts and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lmbridge import Bridge, Delta, EngineError, UnsupportedOptionError
from lmbridge.engines.openai import jobs
from lmbridge.messages import Embed, Logprobs, Request, ToolCall
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from lmbridge.testing.scripted_encoder import vector_of
from tests.engines.openai.conftest import PATIENCE, Far, Rude, answer, chunk, events, http

SAID: list[str | Delta] = [
    Delta(reasoning="They want "),
    Delta(reasoning="two cities."),
    Delta("I look it up."),
    Delta(tool_calls=[ToolCall(0, "call_a", "weather", '{"city":')]),
    Delta(tool_calls=[ToolCall(0, arguments=' "Paris"}')]),
    Delta(tool_calls=[ToolCall(1, "call_b", "weather", '{"city": "Rome"}')]),
]


def weather(city: str) -> str:
    """The weather of a city."""
    return city


def test_calls_and_thoughts_come_in_pieces(serve: Callable[..., Far]) -> None:
    """An agent over a remote model reads what it would read of a model of its own."""
    with Bridge(serve(ScriptedEngine(lambda request: SAID)).url) as bridge:
        stream = bridge.stream("Paris and Rome?", tools=[weather], timeout=PATIENCE)
        pieces = [call for delta in stream for call in delta.tool_calls]
    assert len(pieces) > 2 or pieces[0].arguments
    response = stream.response
    assert response.reasoning == "They want two cities."
    assert response.text == "I look it up."
    assert [(call.name, call.parsed()) for call in response.tool_calls] == [
        ("weather", {"city": "Paris"}),
        ("weather", {"city": "Rome"}),
    ]
    assert response.finish_reason == "tool_calls"


def test_the_far_ends_own_token_ids_and_probabilities(serve: Callable[..., Far]) -> None:
    """A server that tells token ids gives the ones that its model has, of the prompt as well."""

    def script(request: Request) -> list[str | Delta]:
        entries: list[Logprobs] = [{1: -0.5, 9: -1.0}, {2: -0.25, 8: -3.0}]
        return [Delta("a", logprobs=[entries[0]]), Delta("b", logprobs=[entries[1]])]

    url = serve(ScriptedEngine(script)).url
    with Bridge(url) as bridge:
        for prompt, raw in (("one two", False), ("one two", True)):
            response = bridge.infer(prompt, raw=raw, logprobs=2, return_prompt_token_ids=True, timeout=PATIENCE)
            assert response.text == "ab"
            assert response.token_ids == [1, 2]
            assert response.logprobs == [{1: -0.5, 9: -1.0}, {2: -0.25, 8: -3.0}]
            assert response.prompt_token_ids == [1000, 1001]
            assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 2)


def test_tokens_of_which_only_the_text_is_told(rude: Callable[..., Rude]) -> None:
    """They get ids of the engine's own, and the bridge can say their texts."""
    told = {"content": [{"token": "ye", "logprob": -0.5, "top_logprobs": [{"token": "no", "logprob": -1.5}]}]}
    said = chunk("ye", "stop")
    said["choices"][0]["logprobs"] = told
    server = rude(events(said, "[DONE]"), models=http(200, {"data": [{"id": "m", "owned_by": "openai"}]}))
    with Bridge(server.url) as bridge:
        response = bridge.infer("a", logprobs=1, timeout=PATIENCE)
        assert response.logprobs is not None
        assert bridge.token_texts(list(response.logprobs[0])) == ["ye", "no"]
        assert list(response.logprobs[0].values()) == [-0.5, -1.5]


def test_ids_that_are_told_beside_the_texts(rude: Callable[..., Rude]) -> None:
    """llama.cpp's server tells both, and writes those of a raw text as a chat's."""
    place = {"id": 7, "token": "ye", "logprob": -0.5, "top_logprobs": [{"id": 9, "token": "no", "logprob": -1.5}]}
    said = {"choices": [{"text": "ye", "finish_reason": "stop", "logprobs": {"content": [place]}}]}
    server = rude(events(said, "[DONE]"), models=http(200, {"data": [{"id": "m", "owned_by": "llamacpp"}]}))
    with Bridge(server.url) as bridge:
        response = bridge.infer("a", raw=True, logprobs=1, timeout=PATIENCE)
        assert (response.token_ids, response.logprobs) == ([7], [{7: -0.5, 9: -1.5}])
        assert bridge.token_texts([7, 9, 8]) == ["ye", "no", ""]


def test_texts_of_tokens_that_ids_stand_for(rude: Callable[..., Rude]) -> None:
    """vLLM tells the text of a token that was chosen, and spells the id of the others: that is nobody's text."""

    def place(token: int, logprob: float, text: str) -> dict[str, Any]:
        return {"token": f"token_id:{token}", "logprob": logprob, "bytes": list(text.encode())}

    chosen = {**place(5, -0.5, " né"), "top_logprobs": [place(5, -0.5, "token_id:5"), place(6, -1.0, "token_id:6")]}
    said = chunk(" né", "stop")
    said["choices"][0]["logprobs"] = {"content": [chosen, {**place(7, -0.1, ""), "bytes": None}]}
    said["choices"][0]["stop_reason"] = "word"
    with Bridge(rude(events(said, "[DONE]")).url) as bridge:
        assert bridge.infer("a", logprobs=2, timeout=PATIENCE).logprobs == [{5: -0.5, 6: -1.0}, {7: -0.1}]
        assert bridge.token_texts([5, 6, 7]) == [" né", "", ""]


def test_the_ending_token_is_left_out(rude: Callable[..., Rude]) -> None:
    """vLLM tells it among the others; a stop word's tokens are not it."""
    chunks: list[Any] = [chunk("a"), chunk("", "stop")]
    chunks[0]["choices"][0]["token_ids"], chunks[1]["choices"][0]["token_ids"] = [5], [2]
    with Bridge(rude(events(*chunks, "[DONE]")).url) as bridge:
        assert bridge.infer("a", timeout=PATIENCE).token_ids == [5]
    chunks[1]["choices"][0]["stop_reason"] = "word"
    with Bridge(rude(events(*chunks, "[DONE]")).url) as bridge:
        assert bridge.infer("a", timeout=PATIENCE).token_ids == [5, 2]


@pytest.mark.parametrize(
    ("reason", "expected"), [("length", "length"), ("eos", "stop"), ("content_filter", None), ("abort", None)]
)
def test_how_an_answer_ended(rude: Callable[..., Rude], reason: str, expected: str | None) -> None:
    """One that was cut by somebody's filter is not taken for whole."""
    with Bridge(rude(events(chunk("a"), chunk("", reason), "[DONE]")).url) as bridge:
        if expected is not None:
            assert bridge.infer("a", timeout=PATIENCE).finish_reason == expected
            return
        with pytest.raises(EngineError, match=reason) as caught:
            bridge.infer("a", timeout=PATIENCE)
        assert caught.value.partial == "a"
        assert caught.value.retryable == (reason == "abort")


def test_a_call_by_name_counts_as_a_call(rude: Callable[..., Rude]) -> None:
    """OpenAI's says "stop" where a call was asked for by name."""
    piece = {"index": 0, "id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    with Bridge(rude(events(chunk(tool_calls=[piece]), chunk("", "stop"), "[DONE]")).url) as bridge:
        assert bridge.infer("a", tools=[weather], timeout=PATIENCE).finish_reason == "tool_calls"


# --- vectors and rankings ---


def test_single_texts_share_http_requests(serve: Callable[..., Far]) -> None:
    """Threads that embed one text each cost the far end a few requests, and each gets its own vector and count."""
    encoder = ScriptedEncoder(step_time=0.02)
    with Bridge(serve(encoder).url, task="embed") as bridge:
        texts = [f"text number {number}" for number in range(40)]
        responses = [future.result(PATIENCE) for future in [bridge.submit_embed(text) for text in texts]]
        for text, vector in zip(texts, responses, strict=True):
            expected = vector_of(text)
            assert np.allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
        assert bridge.stats()["in_flight"] == 0
        details = bridge.embed(texts, details=True, timeout=PATIENCE)
        assert sum(response.usage.prompt_tokens for response in details) == 3 * len(texts)
        assert bridge.tasks() == {"embed"}
    assert len(encoder.batches) < len(texts)


def test_options_of_vectors_pass_through(serve: Callable[..., Far]) -> None:
    """What lmbridge's own server knows it is told; texts that want different things do not share a request."""
    encoder = ScriptedEncoder(tasks=["embed"], max_length=4)
    with Bridge(serve(encoder).url) as bridge:
        assert bridge.tasks() == {"embed"}
        short, whole = bridge.embed("one", dimensions=3), bridge.embed("one")
        assert (len(short), len(whole)) == (3, len(vector_of("one")))
        assert np.allclose(bridge.embed("one", normalize=False), vector_of(Embed("one", normalize=False)))
        assert bridge.embed("one two three four five", truncate="end", timeout=PATIENCE).shape == whole.shape


def test_a_ranking_is_the_far_ends(serve: Callable[..., Far]) -> None:
    """The best comes first, with the far end's score."""
    with Bridge(serve(ScriptedEncoder(tasks=["rerank"])).url) as bridge:
        assert bridge.tasks() == {"rerank"}
        ranked = bridge.rerank("one two three", ["none", "one two three", "one two"], timeout=PATIENCE)
    assert [each.index for each in ranked] == [1, 2, 0]


def test_a_server_that_tells_numbers_as_they_are(rude: Callable[..., Rude]) -> None:
    """Not all know base64; vectors have length 1 whoever makes them, and what cannot be asked for is refused."""
    data = {"data": [{"index": 0, "embedding": [3.0, 4.0]}], "usage": {"prompt_tokens": 2}}
    server = rude(http(200, data), models=http(200, {"data": [{"id": "m", "owned_by": "llamacpp"}]}))
    with Bridge(server.url, task="embed") as bridge:
        assert np.allclose(bridge.embed("a", timeout=PATIENCE), [0.6, 0.8])
        options: dict[str, Any]
        for options in ({"normalize": False}, {"prompt": "query"}, {"truncate": "end"}):
            with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
                bridge.embed("a", timeout=PATIENCE, **options)
    assert server.asked[0] == {"model": "m", "input": ["a"], "encoding_format": "base64"}


def test_shares_add_up() -> None:
    """The tokens that a server counts for a batch are all somebody's."""
    items = [jobs._Item(Embed("a" * length)) for length in (1, 2, 30, 7)]
    jobs._share(17, items)
    assert sum(item.usage.prompt_tokens for item in items) == 17


def test_an_answer_to_a_batch_that_lacks_one(rude: Callable[..., Rude]) -> None:
    """It is an error, and nobody gets a neighbour's vector."""
    with Bridge(rude(http(200, {"data": []})).url, task="embed") as bridge, pytest.raises(EngineError, match="read"):
        bridge.embed("a", timeout=PATIENCE)


def test_text_needs_no_chat(rude: Callable[..., Rude]) -> None:
    """Raw text and token ids go where nothing is put around them."""
    said = {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]}
    server = rude(events(said, "[DONE]"), answer("chat"))
    with Bridge(server.url) as bridge:
        assert bridge.infer("a", raw=True, timeout=PATIENCE).text == "yes"
        assert bridge.infer("a", timeout=PATIENCE).text == "chat"
    assert [head.split()[1] for head in server.heads] == ["/v1/completions", "/v1/chat/completions"]
