"""JSON schemas in the words that llguidance knows.

Rule: pure functions of plain data. What it does not know is written in other words, or left out where the standard lets
anything come, or narrowed; what comes of it is valid by the schema as it was given. Everything else is refused with its
place.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from lmbridge.errors import InvalidRequestError

OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As ``json.dumps`` writes: a model that may put spaces anywhere may go on putting them."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("allOf", "anyOf", "prefixItems")
_SINGLE = ("additionalProperties", "additionalItems", "items")
_UNKNOWN = (
    "contains", "minContains", "maxContains", "dependentSchemas", "not", "if", "then", "else", "$dynamicRef",
    "propertyNames", "uniqueItems", "unevaluatedProperties", "unevaluatedItems", "dependencies", "dependentRequired",
)  # fmt: skip
_FORMATS = frozenset(("hostname", "ipv4", "ipv6", "uuid", "uri"))
_NARROWER = {
    "idn-hostname": "hostname", "iri": "uri", "uri-reference": "uri", "iri-reference": "uri", "ipvanyaddress": "ipv4",
    "ipvanyinterface": "ipv4", "ipvanynetwork": "ipv4", "ipv4network": "ipv4", "ipv4interface": "ipv4",
    "ipv6network": "ipv6", "ipv6interface": "ipv6",
}  # fmt: skip
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[2468]0|[13579][26])00)-02-29"
_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = r"((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_CLOCK = r"([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAYS = r"([0-9]{1,3}Y([0-9]{1,3}M([0-9]{1,4}D)?)?|[0-9]{1,3}M([0-9]{1,4}D)?|[0-9]{1,4}D)"
_DURATION = rf"P([0-9]{{1,4}}W|{_DAYS}(T{_CLOCK})?|T{_CLOCK})"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
_EMAIL = rf"[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@({_LABEL}\.){{1,3}}[A-Za-z]{{2,8}}"
_UUID = "[0-9a-f]{{8}}-[0-9a-f]{{4}}-{}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
_PATTERNS = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "duration": _DURATION, "email": _EMAIL,
    "idn-email": _EMAIL, **{f"uuid{version}": _UUID.format(version) for version in range(1, 9)},
}  # fmt: skip
"""Where llguidance lets through what parsers refuse: 29 February of any year, a 61st second, an address without a dot,
a duration without end."""
_CHECKED = frozenset(("regex", "json-pointer", "relative-json-pointer", "uri-template"))
"""Formats of the standard, which validators may insist on; what others are called binds nobody."""
_AHEAD = re.compile(r"\(\?(?:=(?P<has>(?:[^()\\]|\\.)*)|!\^\[(?P<only>(?:[^\]\\]|\\.)*)\]\*\$)\)")
_DEEPEST = 200
_AT_ONCE = 1_000  # texts of one rule

Schema = dict[str, Any]


def followable(schema: Any, param: str) -> Schema:
    """The schema for llguidance, with how to write what it leaves open.

    Raises:
        InvalidRequestError: it asks for what no grammar of llguidance's can hold; the message quotes the place.
    """
    schema = copy.deepcopy(schema)
    try:
        writer = _Writer(schema, param)
        writer.require_tags(schema)
        written = writer.write(schema, "#")
    except (TypeError, AttributeError, RecursionError) as cause:
        raise InvalidRequestError(f"The JSON schema cannot be followed: it is malformed ({cause}).", param) from cause
    if written is False:
        raise InvalidRequestError(f"The schema in {param} is false: no answer is valid.", param)
    return {**({} if written is True else written), "x-guidance": OPTIONS}


def choice_lines(rule: str, texts: Sequence[str]) -> list[str]:
    """Rules of a Lark grammar, the first of that name, for one of several texts: llguidance takes 2,000 at once."""
    quoted = [json.dumps(text, ensure_ascii=False) for text in texts]
    if len(quoted) <= _AT_ONCE:
        return [f"{rule}: {' | '.join(quoted)}"]
    lots = [quoted[start : start + _AT_ONCE] for start in range(0, len(quoted), _AT_ONCE)]
    names = [f"{rule}_{number}" for number in range(len(lots))]
    return [
        f"{rule}: {' | '.join(names)}",
        *(f"{name}: {' | '.join(lot)}" for name, lot in zip(names, lots, strict=True)),
    ]


class _Writer:
    def __init__(self, root: Any, param: str) -> None:
        self._root, self._param = root, param

    def write(self, schema: Any, place: str) -> Any:
        """A schema, and all that are in it."""
        if not isinstance(schema, dict):
            return schema
        if place.count("/") > _DEEPEST:
            raise self._refused(place, "it is nested too deeply")
        if "oneOf" in schema:
            self._check_alternatives(schema["oneOf"], f"{place}/oneOf")
        schema = {key: value for key, value in schema.items() if key not in ("x-guidance", "discriminator")}
        if "propertyNames" in schema:
            schema["propertyNames"] = self._resolved(schema["propertyNames"])
        for rewrite in _REWRITES:
            schema = rewrite(schema)
        for key in _UNKNOWN:
            if key in schema:
                raise self._refused(f"{place}/{key}", f"answers cannot be held to {key}")
        if schema.get("format") in _CHECKED:
            raise self._refused(f"{place}/format", f"answers cannot be held to the format {schema['format']}")
        return {key: self._inside(key, value, f"{place}/{key}") for key, value in schema.items()}

    def _inside(self, key: str, value: Any, place: str) -> Any:
        if key in _NAMED and isinstance(value, dict):
            return {name: self.write(inner, f"{place}/{name}") for name, inner in value.items()}
        if key in (*_LISTED, *_SINGLE) and isinstance(value, list):
            return [self.write(inner, f"{place}/{number}") for number, inner in enumerate(value)]
        return self.write(value, place) if key in _SINGLE else value

    # --- one of several ---

    def require_tags(self, schema: Any) -> None:
        """What a ``discriminator`` names is in every alternative: by its default it could be left out."""
        inside = list(schema.values()) if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        for inner in inside:
            self.require_tags(inner)
        if not isinstance(schema, dict) or not isinstance(schema.get("discriminator"), dict):
            return
        name = schema["discriminator"].get("propertyName")
        for option in map(self._resolved, schema.get("oneOf", ())):
            if isinstance(option, dict) and name in option.get("properties", {}):
                option["required"] = list(dict.fromkeys([*option.get("required", []), name]))

    def _check_alternatives(self, options: Any, place: str) -> None:
        """A value of one must be none of another: then ``anyOf`` says the same."""
        if not isinstance(options, list):
            raise self._refused(place, "it is no list")
        for number, one in enumerate(options):
            for other in options[:number]:
                if not self._disjoint(one, other):
                    raise self._refused(place, "one value may be several of its alternatives; anyOf would allow that")

    def _disjoint(self, one: Any, other: Any, depth: int = 4) -> bool:
        one, other = self._resolved(one), self._resolved(other)
        if not isinstance(one, dict) or not isinstance(other, dict) or not depth:
            return one is False or other is False
        kinds = _kinds(one), _kinds(other)
        if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
            return True
        values = _values(one), _values(other)
        if values[0] is not None and values[1] is not None:
            return not values[0] & values[1]
        if {"object"} not in kinds:
            return False
        return _lacks(one, other) or _lacks(other, one) or self._told_apart(one, other, depth - 1)

    def _told_apart(self, one: Schema, other: Schema, depth: int) -> bool:
        both = set(one.get("required", ())) & set(other.get("required", ()))
        mine, its = one.get("properties", {}), other.get("properties", {})
        return any(name in mine and name in its and self._disjoint(mine[name], its[name], depth) for name in both)

    def _resolved(self, schema: Any) -> Any:
        """Where a reference leads, if it stands alone; what cannot be found is llguidance's to tell."""
        for _ in range(_DEEPEST):
            if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#"):
                break
            target = self._root
            for name in schema["$ref"].split("/")[1:]:
                target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            schema = target
        return schema

    def _refused(self, place: str, why: str) -> InvalidRequestError:
        return InvalidRequestError(f"The JSON schema cannot be followed: {place}: {why}.", self._param)


def _kinds(schema: Schema) -> set[str]:
    """The types of its values, as far as it says."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {_kind(value) for value in values}
    kinds = schema.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    return {"number" if kind == "integer" else kind for kind in kinds}


def _kind(value: Any) -> str:
    named = {bool: "boolean", str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return named.get(type(value), "null")


def _values(schema: Schema) -> set[str] | None:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else None


def _lacks(one: Schema, other: Schema) -> bool:
    """Whether one has no place for what the other must have."""
    closed = one.get("additionalProperties") is False and not {"patternProperties", "allOf", "$ref"} & one.keys()
    return closed and not set(other.get("required", ())) <= one.get("properties", {}).keys()


# --- other words for one schema; each is given one that it may not change ---


def _one_of(schema: Schema) -> Schema:
    if "oneOf" not in schema:
        return schema
    options = schema["oneOf"]
    rest = {key: value for key, value in schema.items() if key != "oneOf"}
    if "anyOf" not in rest:
        return {**rest, "anyOf": options}
    return {**rest, "allOf": [*rest.get("allOf", []), {"anyOf": options}]}


def _format(schema: Schema) -> Schema:
    name = schema.get("format")
    if name is None or name in _FORMATS or name in _CHECKED:
        return schema
    if name in _NARROWER:
        return {**schema, "format": _NARROWER[name]}
    rest = {key: value for key, value in schema.items() if key != "format"}
    if name not in _PATTERNS:
        return rest
    if name == "email" and "(?" in str(rest.get("pattern")):  # as libraries tell addresses; ours are among theirs
        del rest["pattern"]
    return _matching(rest, [f"^{_PATTERNS[name]}$"])


def _pattern(schema: Schema) -> Schema:
    """Expressions that begin by looking ahead: what they look for is an expression of its own."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or not pattern.startswith("^(?"):
        return schema
    more, rest = [], pattern[1:]
    while found := _AHEAD.match(rest):
        more.append(f"^{found['has']}" if found["has"] is not None else f"[^{found['only']}]")
        rest = rest[found.end() :]
    return _matching({**schema, "pattern": f"^{rest}"}, more)


def _matching(schema: Schema, patterns: list[str]) -> Schema:
    """The schema with further patterns."""
    if "pattern" not in schema and len(patterns) == 1:
        return {**schema, "pattern": patterns[0]}
    return (
        {**schema, "allOf": [*schema.get("allOf", []), *({"pattern": each} for each in patterns)]}
        if patterns
        else schema
    )


def _names(schema: Schema) -> Schema:
    """``propertyNames``: any, some, or those of a pattern."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict):
        return schema
    rest = {key: value for key, value in schema.items() if key != "propertyNames"}
    values = schema.get("additionalProperties", True)
    asked = names.keys() - {"type", "title", "description"}
    if names.get("type", "string") != "string" or len(asked) > 1 or asked - {"enum", "const", "pattern"}:
        return schema
    if not asked:
        return rest
    if "properties" in schema or "patternProperties" in schema:
        return schema
    if "pattern" in names:
        return {**rest, "patternProperties": {names["pattern"]: values}, "additionalProperties": False}
    some = names.get("enum", [names.get("const")])
    return {**rest, "properties": dict.fromkeys(some, values), "additionalProperties": False}


def _unique(schema: Schema) -> Schema:
    most = schema.get("maxItems")
    harmless = schema.get("uniqueItems") is False or (isinstance(most, int) and most < 2)
    return {key: value for key, value in schema.items() if key != "uniqueItems"} if harmless else schema


def _unevaluated(schema: Schema) -> Schema:
    """Without parts that evaluate for it, it is what it is called elsewhere."""
    if schema.keys() & {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "contains"}:
        return schema
    for old, new in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if old in schema:
            rest = {key: value for key, value in schema.items() if key != old}
            schema = rest if new in rest else {**rest, new: schema[old]}
    return schema


def _dependent(schema: Schema) -> Schema:
    """What some properties ask for is always there."""
    for key in ("dependentRequired", "dependencies"):
        asked = schema.get(key)
        if isinstance(asked, dict) and all(isinstance(names, list) for names in asked.values()):
            rest = {each: value for each, value in schema.items() if each != key}
            needed = [*rest.get("required", []), *(name for names in asked.values() for name in names)]
            schema = {**rest, "required": list(dict.fromkeys(needed))}
    return schema


_REWRITES: tuple[Callable[[Schema], Schema], ...] = (
    _unevaluated, _one_of, _format, _pattern, _names, _unique, _dependent,
)  # fmt: skip
