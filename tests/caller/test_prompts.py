"""What counts as a prompt or a batch, and which values of foreign libraries stand for plain ones."""

from __future__ import annotations

import math
from array import array
from collections import ChainMap, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch

from lmbridge import Bridge, GenerationConfig, InvalidRequestError, Response
from lmbridge.caller.prompts import check_prompt, is_batch
from lmbridge.messages import Overrides, Request
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]
HELLO = {"role": "user", "content": "hello"}


class Turn(Mapping[str, Any]):
    """A message of a library's own."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class Broken(Turn):
    """One that cannot be read."""

    def __getitem__(self, name: str) -> Any:
        raise OSError("the database has gone")


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [
        ([None, "q"], True),
        (["q", None], True),
        ([None], True),
        ([None, None], True),
        ([[HELLO], "q"], True),
        ([HELLO, "q"], True),
        ([1, "q"], True),
        ([1, [2]], True),
        ([[], "q"], True),
        ([object(), [1]], True),
        (("a", "b"), True),
        (deque(["a", "b"]), True),
        (UserList(["a", "b"]), True),
        (np.array(["a", "b"]), True),
        ([np.array([1, 2]), None], True),
        ([torch.tensor([1, 2])], True),
        ([HELLO, None], False),
        ([None, HELLO], False),
        ([MappingProxyType(HELLO)], False),
        ([HELLO, 1], False),
        ([1, None], False),
        ([None, 1], False),
        ([True], False),
        ([0.5], False),
        ((1, 2), False),
        (range(3), False),
        (array("i", [1, 2]), False),
        (np.array([1, 2]), False),
        (torch.tensor([1, 2]), False),
        (torch.tensor([[1, 2]]), False),
        (b"bytes", False),
        ({"role": "user"}, False),
        ({"a", "b"}, False),
        (None, False),
    ],
)
def test_what_a_list_holds_says_what_it_is(prompts: Any, batch: bool) -> None:
    """One missing value at the head of a table's column would turn all its prompts into one that is refused."""
    assert is_batch(prompts) is batch


@pytest.mark.parametrize("bad", [None, 5, [], [[1]], HELLO, b"bytes", [{"content": "no role"}], [Broken(role="user")]])
@pytest.mark.parametrize("place", [0, 1])
def test_each_slot_is_judged_alone(scripted: Scripted, bad: Any, place: int) -> None:
    """A prompt that is none would fail the others of its batch, or be told as somebody else's fault."""
    bridge, _ = scripted()
    prompts = ["good", "fine"]
    prompts.insert(place, bad)
    results = bridge.infer(prompts, return_exceptions=True)
    error = results.pop(place)
    assert isinstance(error, InvalidRequestError)
    assert (error.index, error.param) == (place, "prompt")
    assert "prompt" in str(error) or "conversation" in str(error)
    assert [result.text for result in results if isinstance(result, Response)] == ["good", "fine"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([HELLO, None], "Message 1 .* not None"),
        ([HELLO, 7], "Message 1 .* not 7"),
        ([None, HELLO], "Message 0 .* not None"),
        ([1, None], "Token 1 .* not None"),
        ([True, 1], "Token 0 .* not True"),
        ([1, 0.5], "Token 1 .* not 0.5"),
        (np.array([1.0]), "Token 0 .* not 1.0"),
        (torch.tensor([[1, 2]]), "got Tensor of 2 dimensions. Give 1 dimension"),
        (np.array(3), "got ndarray of 0 dimensions"),
        ((text for text in ["a", "b"]), "got generator. Make a list of it"),
        ({"a", "b"}, "got set. Make a list of it"),
        (HELLO, "got dict. Put a message into a list"),
        (b"bytes", "got b'bytes'"),
        (None, "got None"),
    ],
)
def test_what_is_wrong_is_told(scripted: Scripted, prompt: Any, says: str) -> None:
    """A caller who gives something close to a prompt is told what it was taken for and what to give instead."""
    bridge, _ = scripted()
    with pytest.raises(InvalidRequestError, match=says) as caught:
        bridge.infer(prompt)
    assert caught.value.param == "prompt"


def test_an_empty_batch_has_no_answers(scripted: Scripted) -> None:
    """A script over a table that happens to be empty must not fail, whatever its column is made of."""
    bridge, _ = scripted()
    empty: list[Any] = [[], (), np.array([]), deque()]
    assert [bridge.infer(prompts) for prompts in empty] == empty[:1] * 4


@pytest.mark.parametrize("message", [MappingProxyType(HELLO), ChainMap({}, HELLO), Turn(**HELLO)])
def test_messages_of_any_mapping_reach_the_engine_as_dicts(message: Mapping[str, Any]) -> None:
    """A conversation read from a library with mappings of its own would be refused, or fail in a chat template."""
    checked = check_prompt([message])
    assert checked == [HELLO]
    assert type(checked[0]) is dict


def test_a_conversation_is_copied_at_submission() -> None:
    """A chat that goes on while its last turn waits must not change what the model is asked."""
    prompt = [dict(HELLO)]
    checked = check_prompt(prompt)
    prompt[0]["content"] = "something else"
    prompt.append(HELLO)
    assert checked == [HELLO]


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(7), np.uint8(8)],
        np.array([7, 8], dtype=np.int32),
        torch.tensor([7, 8]),
        array("q", [7, 8]),
        range(7, 9),
        (7, np.int16(8)),
    ],
)
def test_token_ids_of_any_kind_reach_the_engine_as_ints(ids: Any) -> None:
    """What a tokenizer returns as an array would be refused, or fail in an engine that knows ints only."""
    checked = check_prompt(ids)
    assert checked == [7, 8]
    assert {type(token) for token in checked} == {int}


@pytest.mark.parametrize(
    ("field", "given", "plain"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", Fraction(1, 2), 0.5),
        ("temperature", np.int64(0), 0),
        ("top_p", np.float16(1), 1.0),
        ("repetition_penalty", np.longdouble(2), 2.0),
        ("max_new_tokens", np.int64(512), 512),
        ("top_k", np.uint8(3), 3),
        ("random_seed", np.uint64(2**63), 2**63),
        ("logprobs", np.int8(20), 20),
        ("do_sample", np.False_, False),
        ("ignore_eos", np.True_, True),
        ("stop_words", ("x", "y"), ["x", "y"]),
        ("stop_words", np.array(["x"]), ["x"]),
        ("stop_token_ids", np.array([1, 2]), [1, 2]),
        ("stop_token_ids", torch.tensor([1]), [1]),
        ("stop_token_ids", [np.int32(1)], [1]),
    ],
)
def test_options_of_any_kind_reach_the_engine_as_plain_ones(field: str, given: Any, plain: Any) -> None:
    """A number out of an array would be refused by its precision, or surprise an engine that asks for its type."""
    overrides = cast(Overrides, {field: given})
    for config in (GenerationConfig().merged(overrides), GenerationConfig(**overrides).merged({})):
        value = getattr(config, field)
        assert (value, repr(value)) == (plain, repr(plain))  # the items of a list too
        assert type(value) is type(plain)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("temperature", math.inf),
        ("temperature", np.float32("nan")),
        ("temperature", True),
        ("temperature", np.True_),
        ("temperature", Decimal("0.5")),
        ("temperature", "0.5"),
        pytest.param("temperature", 10**400, id="beyond any float"),
        pytest.param("temperature", Fraction(10**400), id="a fraction beyond any float"),
        ("temperature", np.array([0.5])),
        ("temperature", np.float32(-1)),
        ("top_p", np.float64(0)),
        ("max_new_tokens", 512.0),
        ("max_new_tokens", np.float64(512)),
        ("max_new_tokens", None),
        ("max_new_tokens", np.int64(0)),
        ("do_sample", 1),
        ("ignore_eos", 0),
        ("skip_special_tokens", 1),
        ("skip_special_tokens", None),
        ("stop_words", "word"),
        ("stop_words", [""]),
        ("stop_words", [b"x"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", np.array([1.5])),
        ("stop_token_ids", np.array([[1]])),
    ],
)
def test_options_that_are_no_such_values_are_refused(field: str, given: Any) -> None:
    """512.0 and 0 equal a default, and would slip through to an engine that takes them for something else."""
    overrides = cast(Overrides, {field: given})
    with pytest.raises(InvalidRequestError, match=f"{field} must be ") as caught:
        GenerationConfig().merged(overrides)
    assert caught.value.param == field
    with pytest.raises(InvalidRequestError, match=f"{field} must be "):
        GenerationConfig(**overrides).check()


def test_lists_of_a_config_are_copied_at_submission(scripted: Scripted) -> None:
    """A list that goes on being used by its owner must not change the requests that are on their way with it."""
    seen: list[GenerationConfig] = []

    def script(request: Request) -> list[str]:
        seen.append(request.config)
        return ["ok"]

    bridge, _ = scripted(ScriptedEngine(script))
    config = GenerationConfig(stop_words=["END"], stop_token_ids=[7])
    assert bridge.infer("go", config).text == "ok"
    assert config.stop_words is not None
    assert config.stop_token_ids is not None
    config.stop_words.append("go")
    config.stop_token_ids.clear()
    assert (seen[0].stop_words, seen[0].stop_token_ids) == (["END"], [7])
