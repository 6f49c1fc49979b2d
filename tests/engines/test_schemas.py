"""JSON schemas as clients' libraries write them: what comes is valid by the schema that was sent, or it is refused."""

from __future__ import annotations

import copy
import datetime
import enum
import ipaddress
import json
import re
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import UUID4, AwareDatetime, BaseModel, Field

from lmbridge import Bridge, InvalidRequestError
from lmbridge.engines.schemas import followable

ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


@pytest.fixture(scope="module")
def bridge() -> Iterator[Bridge]:
    with Bridge("demo") as bridge:
        yield bridge


def answers(bridge: Bridge, schema: Any, count: int = 4) -> list[str]:
    """Those that ended by themselves."""
    config: dict[str, Any] = {"grammar": {"json": schema}, "temperature": 1.0, "max_new_tokens": 300}
    futures = [bridge.submit("Who?", random_seed=seed, **config) for seed in range(count)]
    return [answer.text for answer in (future.result(60) for future in futures) if answer.finish_reason == "stop"]


A, B = ({"type": "object", "properties": {"is": {"const": name}}, "required": ["is"]} for name in "ab")
CLOSED = {"type": "object", "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"enum": ["a", None]}]},
        {"oneOf": [{**A, **CLOSED}, {**B, **CLOSED}]},
        {"$defs": {"A": {**A, **CLOSED}}, "oneOf": [{"$ref": "#/$defs/A"}, {**B, **CLOSED}]},
        {"oneOf": [{**CLOSED, "properties": {"x": {"type": "null"}}},
                   {**CLOSED, "properties": {"y": {"type": "null"}}, "required": ["y"]}]},
        {"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"const": 2}, {"const": 3}]},
        {**CLOSED, "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}}},
        {"type": "string", "pattern": r"^(?=.*\d)(?=.*[a-z])[a-z0-9]{2,5}$"},
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d{0,5}\.?\d{0,2}$"},
        {"type": "string", "format": "email", "pattern": ZOD_EMAIL},
        {"type": "string", "format": "email", "pattern": r"^(?:alice|bob)@example\.com$"},
        {"type": "string", "pattern": "^(?=fo|ba)[a-z]{2,5}$"},
        {"type": "string", "pattern": r"^(?!^[^0-9]*$)[a-z0-9]{1,3}$"},
        {"type": "string", "pattern": r"^(?!^[^^0-9]*$)[\^a-z0-9]{1,3}$"},
        {"type": "object", "propertyNames": {"enum": ["a", 1]}, "additionalProperties": {"type": "null"}},
        {"type": "array", "items": {"type": "integer", "multipleOf": 9973, "minimum": 1, "maximum": 10**6}},
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(700)}, **CLOSED},
        {"type": ["string", "null"], "format": "date", "pattern": "^19"},
        {"type": "object", "propertyNames": {"pattern": "^[xy]$"}, "additionalProperties": {"type": "null"}},
        {"type": "object", "propertyNames": {"const": "x"}, "additionalProperties": {"type": "null"}},
        {"type": "object", "propertyNames": {"type": "string"}, "properties": {"a": {"const": 1}}, "required": ["a"],
         "maxProperties": 1},
        {**CLOSED, "properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependentRequired": {"a": ["b"]}},
        {**CLOSED, "properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependencies": {"a": ["b"]}},
        {"type": "object", "properties": {"a": {"const": 1}}, "unevaluatedProperties": False},
        {"type": "array", "prefixItems": [{"const": 1}], "unevaluatedItems": False},
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 1},
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": False, "maxItems": 2},
        {"type": "string", "format": "of-our-own", "nullable": True, "maxLength": 3, "x-order": 1},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        {"type": "string", "maxLength": 3},
        {"type": "null"},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)  # fmt: skip
def test_what_clients_write(bridge: Bridge, schema: Any) -> None:
    """Answers validate, by the schema that was sent and not by what was made of it."""
    sent = copy.deepcopy(schema)
    texts = answers(bridge, schema)
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert schema == sent


@pytest.mark.parametrize("schema", [{}, True, {"description": "anything"}])
def test_any_value(bridge: Bridge, schema: Any) -> None:
    """What asks for nothing gets JSON of some kind."""
    for text in answers(bridge, schema, 8):
        json.loads(text)


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    friend: Annotated[Cat | Dog, Field(discriminator="kind")] | None


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Owner(BaseModel, extra="forbid"):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    seen: dict[Color, bool]
    pair: tuple[bool, Color]


class Times(BaseModel, extra="forbid"):
    at: datetime.datetime
    aware: AwareDatetime
    day: datetime.date
    time: datetime.time
    wait: datetime.timedelta
    id: uuid.UUID
    id4: UUID4
    address: ipaddress.IPv4Address


@pytest.mark.parametrize("model", [Owner, Times])
def test_what_pydantic_writes(bridge: Bridge, model: type[BaseModel]) -> None:
    """Its own parser takes the answers: unions told apart by a field, days that exist, times without a leap second."""
    if model is Owner:  # whose pets may have further fields, of any kind
        schema = json.loads(json.dumps(model.model_json_schema()))
        for pet in ("Cat", "Dog"):
            schema["$defs"][pet]["additionalProperties"] = False
    else:
        schema = model.model_json_schema()
    texts = answers(bridge, schema, 8)
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
        model.model_validate_json(text)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "#/oneOf: .*anyOf"),
        ({"items": {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}}, "#/items/oneOf: "),
        ({"oneOf": 3}, "#/oneOf: it is not a list"),
        ({"properties": {"a": {"not": {"const": 1}}}}, "#/properties/a/not: "),
        ({"$defs": {"S": {"type": "array", "uniqueItems": True}}}, "#/\\$defs/S/uniqueItems: "),
        ({"anyOf": [{"if": {}, "then": {}}]}, "#/anyOf/0/if: "),
        ({"patternProperties": {"^a": {"contains": {}}}}, "#/patternProperties/\\^a/contains: "),
        ({"dependentSchemas": {}}, "#/dependentSchemas: "),
        ({"propertyNames": {"minLength": 2}}, "#/propertyNames: "),
        ({"$defs": {"A": {}}, "$ref": "#/$defs/A", "unevaluatedProperties": False}, "#/unevaluatedProperties: "),
        ({"format": "json-pointer"}, "#/format: .*json-pointer"),
        ({"pattern": r"a(?<!b)c"}, re.escape(r"a(?<!b)c")),
        ({"x-guidance": {"lenient": True}, "not": {}}, "#/not: "),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"format": []}, "malformed"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "#/oneOf: "),
        ({"oneOf": [{"enum": [[{"a": 2}]]}, {"enum": [[{"a": 2.0}]]}]}, "#/oneOf: "),
        ({"propertyNames": {"$ref": "#/$defs/N", "pattern": "^a"}, "$defs": {"N": {}}}, "#/propertyNames: "),
        ({"properties": {"a": {"type": ["null", "strin"]}}}, "#/properties/a/type: .* strin"),
        ({"items": {"$ref": "#/anyOf/2"}, "anyOf": [{}, {}]}, "#/items/\\$ref: .*#/anyOf/2"),
        ({"items": {"minimum": 10**400}}, "#/items/minimum: "),
        ({"items": {"multipleOf": -1}}, "#/items/multipleOf: "),
        ({"$ref": "#"}, "#: .*without end"),
        ({**CLOSED, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#: .*without end"),
        (
            {
                "$ref": "#/$defs/A",
                "$defs": {"A": {"anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#"}}]}},
            },
            "without end",
        ),
        (False, "no answer is valid"),
    ],
)
def test_what_is_refused(bridge: Bridge, schema: Any, words: str) -> None:
    """With its place, or in llguidance's words: better than an answer that does not validate."""
    with pytest.raises(InvalidRequestError, match=words) as caught:
        bridge.infer("Who?", grammar={"json": schema})
    assert caught.value.param == "grammar"


OFTEN = {"type": "integer", "multipleOf": 997}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"items": {"type": "integer", "multipleOf": 10**9}}, "#/items/multipleOf: "),
        ({"multipleOf": 0.0009765625}, "#/multipleOf: "),
        ({"allOf": [OFTEN, {"multipleOf": 1009}]}, "#/allOf/1/multipleOf: .*together|common"),
        ({"properties": {"a": {"properties": {f"p{i}": {} for i in range(10_000)}}}}, "#/properties/a/properties: "),
        ({"patternProperties": {f"^k{i}_": {} for i in range(300)}}, "#/patternProperties: "),
        ({"enum": [[i, {"a": i}] for i in range(20_000)]}, "#/enum: "),
        ({"oneOf": [{"enum": [f"{i}-{j}" for j in range(100)]} for i in range(1000)]}, "#/oneOf: .*too many"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_takes_too_long(schema: Any, place: str) -> None:
    """A small schema that costs a minute or gigabytes is refused before all other requests wait for it."""
    with pytest.raises(InvalidRequestError, match=place):
        followable(schema, "grammar")


def test_what_only_looks_costly(bridge: Bridge) -> None:
    """Large numbers that are cheap, many small alternatives and references that do end are no reason to refuse."""
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}
    for schema in (
        {"$defs": {"N": {**node, "required": ["next"]}}, "$ref": "#/$defs/N"},
        {"type": "object", "properties": {"never": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"oneOf": [{**CLOSED, "properties": {"is": {"const": i}}, "required": ["is"]} for i in range(150)]},
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 1000}, "c": {"multipleOf": 60}}},
        {
            "type": "object",
            "properties": {f"p{i}": {} for i in range(5000)},
            "required": [f"p{i}" for i in range(5000)],
        },
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "number", "minimum": -1.7976931348623157e308, "exclusiveMaximum": 1.7976931348623157e308},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "maxItems": 10**9},
        {"type": "string", "pattern": "^((a|bc){1,1000}x){1,1000}$"},
        {"enum": [f"value {i}" for i in range(20_000)]},
    ):
        assert bridge.infer("Who?", grammar={"json": schema}, max_new_tokens=3).token_ids


def test_nested_deeply() -> None:
    """It is refused, not a stack that overflows."""
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        followable(schema, "grammar")


def test_objects_hold_what_they_name() -> None:
    """A small model would go on with properties of its own until it is cut off."""
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    written = followable({"type": "array", "items": inner, "$defs": {"free": {"type": "object"}}}, "grammar")
    assert written["items"]["additionalProperties"] is False
    assert "additionalProperties" not in written["$defs"]["free"]
    for said in (
        {**inner, "additionalProperties": True},
        {**inner, "additionalProperties": {"type": "string"}},
        {**inner, "patternProperties": {"^x": True}},
        {**inner, "required": ["b"]},
        {**inner, "minProperties": 2},
    ):
        assert followable(said, "grammar").get("additionalProperties") is not False


def test_objects_of_several_parts_stay_open() -> None:
    """One part would forbid what another asks for, so that there were no answer."""
    parts = [{"properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]
    for schema in ({"type": "object", "allOf": parts}, {"type": "object", "properties": {"c": True}, "anyOf": parts}):
        assert "additionalProperties" not in str(followable(schema, "grammar"))
