"""What a GenerationConfig asks of vLLM, by one engine on its real CPU kernels."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs vLLM; tests/engines/vllm/run.sh installs its build for CPUs", allow_module_level=True)

from lmbridge import Bridge, GenerationConfig, Response
from lmbridge.engines.models import DEMO_FOLDER
from lmbridge.errors import InvalidRequestError, PromptTooLongError, QueueFullError
from lmbridge.messages import Logprobs
from tests.engines.vllm.conftest import QUIET, small

pytestmark = QUIET
ASKED = "What is the capital of France?"
CHATTY = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def bridge() -> Iterator[Bridge]:
    with Bridge(small) as bridge:
        yield bridge


@pytest.fixture(scope="module")
def plain() -> Iterator[Bridge]:
    """The same model under transformers."""
    with Bridge("demo", dtype="float32") as bridge:
        yield bridge


# ------------------------------------------------------------------------------------------------------ tokens and text


@pytest.mark.parametrize("prompt", [ASKED, CHATTY, "Hello!", "Count to ten."])
def test_greedy_answers_are_those_of_transformers(bridge: Bridge, plain: Bridge, prompt: str) -> None:
    """A user who moves to vLLM would find other answers, other usage, another end."""
    ours, theirs = bridge.infer(prompt), plain.infer(prompt)
    assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
    assert (ours.finish_reason, ours.usage) == (theirs.finish_reason, theirs.usage)


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.3}, {"frequency_penalty": 1.5}, {"presence_penalty": 1.5},
        {"min_new_tokens": 40, "max_new_tokens": 60}, {"ignore_eos": True, "max_new_tokens": 60},
        {"logit_bias": {4: -100.0}, "max_new_tokens": 60}, {"stop_words": ["a"]}, {"stop_words": [" and "]},
        {"stop_words": ["the"], "include_stop_str_in_output": True}, {"skip_special_tokens": False},
        {"truncate_prompt_tokens": 4}, {"stop_token_ids": [18]}, {"stop_token_ids": [18], "ignore_eos": True},
        {"add_generation_prompt": False, "max_new_tokens": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_means_what_it_means_to_transformers(bridge: Bridge, plain: Bridge, asked: dict[str, Any]) -> None:
    """The same GenerationConfig would give another answer on another engine."""
    config = GenerationConfig(**asked)
    messages = [{"role": "user", "content": CHATTY}]
    ours, theirs = bridge.infer(messages, config), plain.infer(messages, config)
    assert (ours.text, ours.token_ids, ours.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
    assert ours.usage == theirs.usage


def test_logprobs_are_those_of_the_model(bridge: Bridge, plain: Bridge) -> None:
    """A score made of log-probabilities would be another one under vLLM."""
    ours = bridge.infer(ASKED, logprobs=2, prompt_logprobs=1, max_new_tokens=4)
    theirs = plain.infer(ASKED, logprobs=2, prompt_logprobs=1, max_new_tokens=4)
    assert ours.prompt_token_ids == theirs.prompt_token_ids
    for mine, other in zip(entries(ours), entries(theirs), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert next(iter(mine)) == next(iter(other))
            assert mine == pytest.approx(other, abs=1e-3)


def entries(response: Response) -> list[Logprobs | None]:
    assert response.logprobs is not None
    assert response.prompt_logprobs is not None
    return [*response.prompt_logprobs, *response.logprobs]


def test_a_seed_gives_the_same_text_again(bridge: Bridge) -> None:
    """A seeded request would change with what else is in the batch; any whole number is a seed."""
    for seed in (7, 2**70):
        alone = bridge.infer(CHATTY, temperature=1.5, random_seed=seed, max_new_tokens=20).text
        together = [bridge.submit(CHATTY, temperature=1.5, random_seed=seed, max_new_tokens=20) for _ in range(4)]
        assert [future.result(60).text for future in together] == [alone] * 4


def test_the_models_own_settings_change_nothing(tmp_path: Path, bridge: Bridge) -> None:
    """A model that recommends a temperature would answer at random though nobody asked for it."""
    for file in DEMO_FOLDER.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    recommended = {"do_sample": True, "temperature": 3.0, "top_k": 50, "repetition_penalty": 3.0, "eos_token_id": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    with Bridge(lambda: small(str(tmp_path))) as other:
        assert other.infer(CHATTY).text == bridge.infer(CHATTY).text


# ---------------------------------------------------------------------------------------------------------------- forms


def test_answers_have_the_form_asked_for(bridge: Bridge) -> None:
    """JSON that does not parse, or a choice that was not given, would reach the user's code."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = json.loads(bridge.infer(ASKED, response_format=asked, max_new_tokens=100).text)
    assert 10 <= answer["a"] <= 99
    assert answer["b"] in ("x", "y")
    assert bridge.infer(ASKED, grammar={"choice": ["red", "blue"]}).text in ("red", "blue")
    assert len(bridge.infer(ASKED, grammar={"regex": "[0-9]{3}"}).text) == 3
    assert set(bridge.infer(ASKED, grammar='start: "a" "b"+ "c"', max_new_tokens=8).text) <= set("abc")
    assert bridge.infer(ASKED, grammar='root ::= "yes" | "no"').text in ("yes", "no")


def test_a_form_that_cannot_be_followed_fails_alone(bridge: Bridge) -> None:
    """A mistake in one user's grammar would end the engine for all."""
    running = bridge.submit(CHATTY, ignore_eos=True, max_new_tokens=200)
    for wrong in ({"regex": "(("}, {"lark": "start: nothing_of_the_kind"}):
        with pytest.raises(InvalidRequestError):
            bridge.infer(ASKED, grammar=wrong)
    assert running.result(60).usage.completion_tokens == 200


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_vllm_refuses_fails_alone(bridge: Bridge) -> None:
    """A token that the model does not have would reach its kernels, and end the engine for all."""
    with pytest.raises(InvalidRequestError) as refused:
        bridge.infer(ASKED, logit_bias={10**6: 1.0})
    assert refused.value.param == "logit_bias"
    with pytest.raises(InvalidRequestError) as refused:
        bridge.infer(ASKED, stop_token_ids=[10**6])
    assert refused.value.param == "stop_token_ids"
    with pytest.raises(PromptTooLongError):
        bridge.infer([5] * 1024)
    assert bridge.infer([5] * 1023, raw=True).usage.completion_tokens == 1
    assert bridge.infer(ASKED).text


def test_limits_of_vllm_are_told_as_full(bridge: Bridge) -> None:
    """A user who sets vLLM's own queue limits would see the engine fail rather than be told to come back."""
    with Bridge(lambda: small(engine_args={"max_num_queued_reqs": 1})) as limited:
        first = limited.stream(CHATTY, ignore_eos=True, max_new_tokens=900)
        next(first)
        with pytest.raises(QueueFullError) as full:
            limited.infer(ASKED, timeout=60)
        assert full.value.retryable
        first.close()
        assert limited.infer(ASKED, timeout=60).text
