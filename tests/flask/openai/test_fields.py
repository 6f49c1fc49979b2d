"""Each field has the effect that its user wants: the official client against the bundled model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types import Completion

from lmbridge.flask.openai.table import CHAT, COMPLETIONS
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import Served

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
SUM = "<|user|>What is 2 + 2?<|end|><|assistant|>"


@pytest.fixture
def client(demo: Served) -> Iterator[OpenAI]:
    with demo.client() as client:
        yield client


def tell(client: OpenAI, messages: Any = FRANCE, **fields: Any) -> str:
    """The greedy answer with these fields, OpenAI's own and others alike."""
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, extra_body=fields)
    return answer.choices[0].message.content or ""


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Completion:
    return client.completions.create(model="demo", prompt=prompt, temperature=0, extra_body=fields)


def test_penalties_and_biases(client: OpenAI) -> None:
    """A penalty keeps words from coming again, and a bias bans a token or forces it."""
    plain = tell(client, STORY, max_tokens=60)
    assert tell(client, STORY, max_tokens=60, frequency_penalty=2, presence_penalty=2) != plain
    paris = complete(client, " Paris", echo=True, max_tokens=0, return_token_ids=True).choices[0]
    token = (paris.model_extra or {})["prompt_token_ids"][-1]
    assert "Paris" not in tell(client, max_tokens=20, logit_bias={str(token): -100})
    forced = client.chat.completions.create(
        model="demo", messages=FRANCE, temperature=0, max_tokens=3, logit_bias={str(token): 100}
    )
    assert (forced.choices[0].message.content or "").count("Paris") == 3
    with pytest.raises(BadRequestError) as caught:
        tell(client, logit_bias={"999999": 1})
    assert caught.value.param == "logit_bias"


def test_how_an_answer_ends(client: OpenAI) -> None:
    """No end before min_tokens, and the stop word stays in the answer for those who want it."""
    longer = client.chat.completions.create(
        model="demo", messages=FRANCE, temperature=0, max_tokens=30, extra_body={"min_tokens": 25}
    )
    assert longer.usage is not None
    assert longer.usage.completion_tokens >= 25
    assert "Paris" not in tell(client, stop="Paris")
    assert tell(client, stop="Paris", include_stop_str_in_output=True).endswith("Paris")


def test_how_a_conversation_is_put(client: OpenAI) -> None:
    """An answer that was begun is gone on with, and a prompt may be cut from its front."""
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of"}]
    assert tell(client, begun, continue_final_message=True).startswith(" France")
    cut = client.chat.completions.create(
        model="demo", messages=FRANCE, max_tokens=1, extra_body={"truncate_prompt_tokens": 4}
    )
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == 4
    assert tell(client, chat_template_kwargs={"enable_thinking": False}) == tell(client, reasoning_effort="low")


TOOLS = [{"type": "function", "function": {"name": "f"}}]
SAMPLES: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5, "repetition_penalty": 1.5, "frequency_penalty": 1,
    "presence_penalty": 1, "logit_bias": {"1": 1}, "seed": 1, "stop": "x", "stop_token_ids": [1], "ignore_eos": True,
    "include_stop_str_in_output": True, "min_tokens": 1, "skip_special_tokens": False, "truncate_prompt_tokens": 5,
    "return_token_ids": True, "chat_template_kwargs": {"x": 1}, "reasoning_effort": "low",
    "add_generation_prompt": False, "continue_final_message": True, "logprobs": True, "top_logprobs": 1, "echo": True,
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}, "guided_json": {"type": "object"},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": 'start: "a"',
    "include_reasoning": False, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True}, "echo": {"logprobs": 0}, "tool_choice": {"tools": TOOLS},
    "parallel_tool_calls": {"tools": TOOLS},
}  # fmt: skip


class _Plain(ScriptedEngine):
    supports = frozenset({"max_new_tokens"})


def test_what_an_engine_cannot_do_is_refused_by_name(served: Callable[..., Served]) -> None:
    """No option is left out silently for an engine that has none but the number of tokens."""
    at = served(_Plain())
    at.bridge.start()
    with at.client() as client:
        for path, table in (("/chat/completions", CHAT), ("/completions", COMPLETIONS)):
            for name in [field.name for field in table.values() if field.option not in (None, "max_new_tokens")]:
                sample = 1 if (name, table) == ("logprobs", COMPLETIONS) else SAMPLES[name]
                needed = NEEDED.get(name, {})
                body = {"messages": FRANCE, "prompt": SUM, **needed, name: sample}
                with pytest.raises(BadRequestError) as caught:
                    client.post(path, body=body, cast_to=object)
                assert caught.value.param in {name, *needed}
                assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(client: OpenAI, stream: bool) -> None:
    """Trainers get the very tokens that were read and made; sent back as a prompt, they are read as they are."""
    options: dict[str, Any] = {"model": "demo", "messages": FRANCE, "temperature": 0, "max_tokens": 5}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True, extra_body={"return_token_ids": True}))
        prompts = [(chunk.model_extra or {}).get("prompt_token_ids") for chunk in chunks]
        assert prompts[1:] == [None] * len(prompts[1:])
        prompt = prompts[0]
        made = [token for chunk in chunks for token in (chunk.choices[0].model_extra or {})["token_ids"]]
    else:
        answer = client.chat.completions.create(**options, extra_body={"return_token_ids": True})
        prompt = (answer.model_extra or {})["prompt_token_ids"]
        made = (answer.choices[0].model_extra or {})["token_ids"]
    again = complete(client, prompt, max_tokens=5, return_token_ids=True).choices[0]
    assert (again.model_extra or {})["prompt_token_ids"] == prompt
    assert (again.model_extra or {})["token_ids"] == made
    assert len(made) == 5


def test_a_prompts_own_probabilities(client: OpenAI) -> None:
    """The form of OpenAI's completions: null for the first token, offsets into the text, no answer."""
    choice = complete(client, SUM + "2 + 2 = 4.", echo=True, logprobs=2, max_tokens=0).choices[0]
    assert choice.text == SUM + "2 + 2 = 4."
    found: Any = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(len(found.tokens))]
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert all(logprob == found.top_logprobs[i][found.tokens[i]] for i, logprob in enumerate(found.token_logprobs) if i)
    certain = found.token_logprobs[-3:]
    assert all(math.exp(logprob) > 0.9 for logprob in certain)


@pytest.mark.parametrize("stream", [False, True])
def test_one_token_after_an_echo_is_always_listed(client: OpenAI, stream: bool) -> None:
    """Evaluators cut the last entry off: without one for an answer that ends at once they would cut the prompt's."""
    prompts = [SUM + "2 + 2 = 4.", SUM]
    options: dict[str, Any] = {"model": "demo", "prompt": prompts, "temperature": 0, "echo": True, "logprobs": 1}
    alone = client.completions.create(**options, max_tokens=0)
    counts = [0, 0]
    if stream:
        for chunk in client.completions.create(**options, max_tokens=1, stream=True):
            for choice in chunk.choices:
                counts[choice.index] += len(choice.logprobs.token_logprobs or []) if choice.logprobs else 0
    else:
        for choice in client.completions.create(**options, max_tokens=1).choices:
            assert choice.logprobs is not None
            counts[choice.index] = len(choice.logprobs.token_logprobs or [])
    for choice in alone.choices:
        assert choice.logprobs is not None
        assert counts[choice.index] == len(choice.logprobs.token_logprobs or []) + 1


def test_an_echo_without_an_answer_streams(client: OpenAI) -> None:
    """The prompt comes in one chunk that ends the answer, and no token of an answer is counted."""
    chunks = list(
        client.completions.create(
            model="demo", prompt=[5, 6, 7], max_tokens=0, echo=True, stream=True, stream_options={"include_usage": True}
        )
    )
    whole = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=0, echo=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text != ""
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage, chunks[-1].usage.completion_tokens) == (whole.usage, 0)
