"""What requests ask for reaches ExLlama's samplers and filters, and nothing else does."""

from __future__ import annotations

import json

import pytest

from lmbridge import Bridge, GenerationConfig, InvalidRequestError, UnsupportedOptionError
from tests.engines.conftest import BYTES, EOS, byte_level_tokenizer
from tests.engines.exllama.conftest import Make, need
from tests.engines.exllama.scripted_cuda import SHORT, answer, script

need("exllamav2", "exllamav3")

PATIENCE = 30.0
A = BYTES["a"]


def ids(prompt: str) -> list[int]:
    """The tokens of one user message."""
    tokenizer = byte_level_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    found: list[int] = tokenizer.encode(text)
    return found


def test_greedy_is_the_models_own_first_choice(bridge: Bridge) -> None:
    """Without any setting the most likely token comes; the libraries' defaults would sample and penalise."""
    found = bridge.infer("hello there", max_new_tokens=60, timeout=PATIENCE)
    assert found.token_ids == answer(ids("hello there"), 60)
    assert found.usage.prompt_tokens == len(ids("hello there"))
    assert found.usage.completion_tokens == 60


def test_twenty_answers_at_once_do_not_mix(bridge: Bridge, way: str) -> None:
    """Twenty visitors at once get each their own answer, out of shared pages and batches."""
    script.rows.clear()
    prompts = [f"prompt {number} " + "of some length " * number for number in range(20)]
    answers = bridge.infer(prompts, max_new_tokens=50, timeout=PATIENCE)
    for prompt, found in zip(prompts, answers, strict=True):
        assert found.token_ids == answer(ids(prompt), 50)
    assert max(script.rows) >= (1 if way == "v2" else 15)  # V3 takes one prompt a step while others are answered


def test_the_ending_token_ends_and_is_not_told(bridge: Bridge) -> None:
    """The model's end of an answer is found, counted, and no part of the text."""
    found = bridge.infer("hello!", timeout=PATIENCE)
    assert found.finish_reason == "stop"
    assert found.token_ids == answer(ids("hello!"), 99)
    assert found.usage.completion_tokens == SHORT + 1


def test_ignore_eos_goes_on(bridge: Bridge) -> None:
    """The ending tokens are ordinary ones for who asks for that."""
    found = bridge.infer("hello!", ignore_eos=True, max_new_tokens=20, timeout=PATIENCE)
    assert (found.finish_reason, len(found.token_ids)) == ("length", 20)
    assert EOS in found.token_ids


def test_min_new_tokens_holds_the_end_back(bridge: Bridge) -> None:
    """Before so many tokens the answer does not end."""
    found = bridge.infer("hello!", min_new_tokens=15, max_new_tokens=40, timeout=PATIENCE)
    assert (found.finish_reason, len(found.token_ids)) == ("stop", 15)


def test_stop_words_and_tokens_end_an_answer(bridge: Bridge) -> None:
    """A word of several tokens, and a token, end the answer there."""
    text = bridge.infer("hello there", max_new_tokens=30, timeout=PATIENCE).text
    stopped = bridge.infer("hello there", stop_words=[text[5:8]], timeout=PATIENCE)
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[5:8])], "stop")
    token = A + ord(text[6]) - ord("a")
    stopped = bridge.infer("hello there", stop_token_ids=[token], timeout=PATIENCE)
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[6])], "stop")


def test_a_seed_gives_the_same_text(bridge: Bridge) -> None:
    """Sampling is repeatable by a seed, and is sampling: two seeds differ."""
    config = GenerationConfig(temperature=5.0, max_new_tokens=30)
    first, again, other = (
        bridge.infer("hello there", config, random_seed=seed, timeout=PATIENCE).text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_truncation_narrows_the_choice(bridge: Bridge) -> None:
    """top_k, top_p and min_p leave only the likely tokens, however hot it is."""
    likely = answer(ids("hello there"), 1)[0]
    for config in (
        GenerationConfig(max_new_tokens=1, temperature=3.0, top_k=2),
        GenerationConfig(max_new_tokens=1, temperature=0.5, top_p=0.9),
        GenerationConfig(max_new_tokens=1, temperature=1.0, min_p=0.2),
    ):
        asked = [bridge.submit("hello there", config, random_seed=seed) for seed in range(8)]
        assert {future.result(PATIENCE).token_ids[0] for future in asked} <= {likely, A + (likely - A + 1) % 26}


def test_a_bias_and_a_penalty_change_what_comes(bridge: Bridge) -> None:
    """logit_bias and repetition_penalty reach the sampler."""
    found = bridge.infer("hello there", max_new_tokens=5, logit_bias={A + 25: 100.0}, timeout=PATIENCE)
    assert found.text == "zzzzz"
    plain = bridge.infer("hello there", max_new_tokens=60, timeout=PATIENCE).text
    assert bridge.infer("hello there", max_new_tokens=60, repetition_penalty=3.0, timeout=PATIENCE).text != plain
    with pytest.raises(InvalidRequestError, match="end at 263"):
        bridge.infer("hello there", logit_bias={264: 1.0}, timeout=PATIENCE)


def test_penalties_over_the_prompt_are_refused(bridge: Bridge) -> None:
    """ExLlama's would count the prompt's tokens too, so that they are refused by name."""
    with pytest.raises(UnsupportedOptionError, match="presence_penalty"):
        bridge.infer("hello there", presence_penalty=1.0, timeout=PATIENCE)


def test_answers_keep_to_a_grammar(bridge: Bridge) -> None:
    """A choice, an expression and a schema hold, in several answers at once and beside a free one."""
    free = bridge.submit("hello there", max_new_tokens=30)
    asked = [bridge.submit("hello", grammar={"choice": ["red", "green"]}) for _ in range(4)]
    number = bridge.submit("hello", grammar={"regex": "[0-9]{3}"})
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    thing = bridge.submit("hello", grammar={"json": schema}, max_new_tokens=60)
    assert {future.result(PATIENCE).text for future in asked} <= {"red", "green"}
    assert number.result(PATIENCE).text.isdigit()
    assert json.loads(thing.result(PATIENCE).text)["on"] in (True, False)
    assert free.result(PATIENCE).token_ids == answer(ids("hello there"), 30)


def test_a_wrong_grammar_is_refused(bridge: Bridge) -> None:
    """What is no expression is an error of that request, at once."""
    with pytest.raises(InvalidRequestError, match="regular expression"):
        bridge.infer("hello", grammar={"regex": "("}, timeout=PATIENCE)


def test_tools_that_must_be_called_are_called(bridge: Bridge) -> None:
    """A call that was asked for comes, with arguments that keep to their schema."""
    tool = {
        "type": "function",
        "function": {
            "name": "lamp",
            "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
        },
    }
    found = bridge.infer("hello!", tools=[tool], tool_choice="required", max_new_tokens=200, timeout=PATIENCE)
    assert found.finish_reason == "tool_calls"
    assert (found.tool_calls[0].name, *found.tool_calls[0].parsed()) == ("lamp", "on")


def test_v3_tells_logprobs(make: Make, way: str) -> None:
    """Log-probabilities are the model's own, one entry a token; V2, whose are of the filtered choice, refuses."""
    with Bridge(make) as bridge:
        if way != "v3":
            with pytest.raises(UnsupportedOptionError, match="logprobs"):
                bridge.infer("hello there", logprobs=2, timeout=PATIENCE)
            return
        found = bridge.infer("hello!", logprobs=2, timeout=PATIENCE)
        assert found.logprobs is not None
        assert len(found.logprobs) == len(found.token_ids) == SHORT
        for token, entry in zip(found.token_ids, found.logprobs, strict=True):
            assert next(iter(entry)) == token
            assert len(entry) == 2
            assert entry[token] == pytest.approx(-0.3133, abs=0.01)  # of two tokens whose scores differ by one
