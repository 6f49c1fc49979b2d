"""Answers of a form, as the official client and vLLM's users ask for them, from the bundled model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import BadRequestError, LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field

from tests.flask.openai.conftest import Served
from tests.flask.openai.test_fields import FRANCE


class Person(BaseModel):
    name: str = Field(max_length=8)
    kind: Literal["cat", "dog"]
    ages: list[Literal[1, 2, 30]] = Field(max_length=2)


@pytest.fixture
def client(demo: Served) -> Iterator[OpenAI]:
    with demo.client() as client:
        yield client


def chat(client: OpenAI, **fields: Any) -> str:
    answer = client.chat.completions.create(model="demo", messages=FRANCE, extra_body=fields)
    return answer.choices[0].message.content or ""


def test_a_class(client: OpenAI) -> None:
    """The client's own way from a class to an object of it; a cut answer is its own error for that."""
    ask: Any = {"model": "demo", "messages": FRANCE, "response_format": Person, "seed": 1}
    found = client.chat.completions.parse(**ask).choices[0].message.parsed
    assert isinstance(found, Person)
    with pytest.raises(LengthFinishReasonError):
        client.chat.completions.parse(**ask, max_tokens=3)


def test_a_stream_of_a_class(client: OpenAI) -> None:
    """The same piece by piece."""
    with client.chat.completions.stream(
        model="demo",
        messages=FRANCE,
        response_format=Person,
    ) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 5}, r"\{.*"),
        ({"response_format": {"type": "text"}}, r".*Paris.*"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}, "whitespace_pattern": None}}, "1|2"),
        ({"structured_outputs": {"grammar": 'root ::= "a" "b"*', "regex": None}, "max_tokens": 9}, "ab*"),
        ({"guided_json": json.dumps({"const": "x"})}, '"x"'),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["x y"]}, "x y"),
        ({"guided_grammar": 'start: "p" "q"'}, "pq"),
    ],
)
def test_other_forms(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    """Each of OpenAI's and vLLM's fields has its effect."""
    assert re.fullmatch(pattern, chat(client, temperature=0, **fields), re.DOTALL)


def test_completions(client: OpenAI) -> None:
    """The older route has them as well, for several answers at once."""
    answer = client.completions.create(
        model="demo", prompt=["One", "Two"], n=2, max_tokens=20, extra_body={"guided_regex": "[a-z]{4}"}
    )
    assert all(re.fullmatch("[a-z]{4}", choice.text) for choice in answer.choices)
    assert len(answer.choices) == 4


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_regex": "(("}, "guided_regex", "unclosed group"),
        ({"guided_json": {"$ref": "#/x"}}, "guided_json", "/x"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "y"}}}},
            "response_format",
            "y",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format", "json_schema"),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice", "another field"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice", "give one"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "give one"),
    ],
)
def test_what_cannot_be_followed(client: OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    """A 400 by the client's own name, with the place at fault."""
    with pytest.raises(BadRequestError, match=words) as caught:
        chat(client, **fields)
    assert caught.value.param == param
