"""Rewrites JSON schemas into what llguidance supports.

Rule: pure functions of plain data; one pass, from the root down.
"""

from __future__ import annotations

import copy
from typing import Any

from lmbridge.engines.schemas.alternatives import Alternatives, TooManyError
from lmbridge.engines.schemas.closing import closed, overlays
from lmbridge.engines.schemas.formats import CHECKED
from lmbridge.engines.schemas.limits import Limits
from lmbridge.engines.schemas.references import References
from lmbridge.engines.schemas.words import REWRITES
from lmbridge.errors import InvalidRequestError

OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As ``json.dumps`` writes: a model that may put spaces anywhere may never stop."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("allOf", "anyOf", "prefixItems")
_SINGLE = ("additionalProperties", "additionalItems", "items")
_UNKNOWN = (
    "contains", "minContains", "maxContains", "dependentSchemas", "not", "if", "then", "else", "$dynamicRef",
    "propertyNames", "uniqueItems", "unevaluatedProperties", "unevaluatedItems", "dependencies", "dependentRequired",
)  # fmt: skip
_DEEPEST = 200

Schema = dict[str, Any]


def followable(schema: Any, param: str) -> Schema:
    """The schema for llguidance, including how to format what it leaves open.

    Raises:
        InvalidRequestError: llguidance cannot express it; the message quotes the place.
    """
    schema = copy.deepcopy(schema)
    try:
        writer = _Writer(schema, param)
        writer.require_tags(schema)
        written = writer.write(schema, "#")
    except (TypeError, AttributeError, RecursionError) as cause:
        raise InvalidRequestError(f"The JSON schema is malformed ({cause}).", param) from cause
    if written is False:
        raise InvalidRequestError(f"The schema in {param} is false: no answer is valid.", param)
    return {**({} if written is True else written), "x-guidance": OPTIONS}


class _Writer:
    def __init__(self, root: Any, param: str) -> None:
        self._param = param
        self._references = References(root)
        self._alternatives = Alternatives(self._references)
        self._limits = Limits(self._refused)
        self._closes = not overlays(root)
        if endless := self._references.endless():
            raise self._refused(endless, "each value would contain another one, without end")

    def write(self, schema: Any, place: str) -> Any:
        """Rewrite a schema and everything in it."""
        if not isinstance(schema, dict):
            return schema
        if place.count("/") > _DEEPEST:
            raise self._refused(place, "it is nested too deeply")
        self._check(schema, place)
        schema = {key: value for key, value in schema.items() if key not in ("x-guidance", "discriminator")}
        if "propertyNames" in schema:
            schema["propertyNames"] = self._references.replaced(schema["propertyNames"])
        for rewrite in REWRITES:
            schema = rewrite(schema)
        schema = closed(schema) if self._closes else schema
        for key in _UNKNOWN:
            if key in schema:
                raise self._refused(f"{place}/{key}", f"{key} is not supported")
        return {key: self._inside(key, value, f"{place}/{key}") for key, value in schema.items()}

    def _check(self, schema: Schema, place: str) -> None:
        self._limits.check(schema, place)
        if self._references.is_lost(schema.get("$ref")):
            raise self._refused(f"{place}/$ref", f"there is nothing at {schema['$ref']}")
        if schema.get("format") in CHECKED:
            raise self._refused(f"{place}/format", f"the format {schema['format']} is not supported")
        if "oneOf" in schema:
            self._check_alternatives(schema["oneOf"], f"{place}/oneOf")

    def _inside(self, key: str, value: Any, place: str) -> Any:
        if key in _NAMED and isinstance(value, dict):
            return {name: self.write(inner, f"{place}/{name}") for name, inner in value.items()}
        if key in (*_LISTED, *_SINGLE) and isinstance(value, list):
            return [self.write(inner, f"{place}/{number}") for number, inner in enumerate(value)]
        return self.write(value, place) if key in _SINGLE else value

    # --- one of several ---

    def require_tags(self, schema: Any) -> None:
        """Require a ``discriminator``'s property in every alternative; a default would make it optional."""
        inside = list(schema.values()) if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        for inner in inside:
            self.require_tags(inner)
        if not isinstance(schema, dict) or not isinstance(schema.get("discriminator"), dict):
            return
        name = schema["discriminator"].get("propertyName")
        for option in map(self._references.resolved, schema.get("oneOf", ())):
            if isinstance(option, dict) and name in option.get("properties", {}):
                option["required"] = list(dict.fromkeys([*option.get("required", []), name]))

    def _check_alternatives(self, options: Any, place: str) -> None:
        """Check that no value matches two alternatives: then ``anyOf`` means the same."""
        if not isinstance(options, list):
            raise self._refused(place, "it is not a list")
        try:
            disjoint = self._alternatives.disjoint(options)
        except TooManyError:
            raise self._refused(place, "it has too many alternatives to compare; use anyOf") from None
        if not disjoint:
            raise self._refused(place, "a value may match several of its alternatives; use anyOf")

    def _refused(self, place: str, why: str) -> InvalidRequestError:
        return InvalidRequestError(f"The JSON schema is not supported: {place}: {why}.", self._param)
