"""A Python function as a tool: its description from its docstring, its parameters' schema from its type hints.

Rule: pure functions on the caller's thread. pydantic knows type hints; it is imported when a function is first given.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NotRequired

from lmbridge.errors import InvalidRequestError

Schema = dict[str, Any]

_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^\s*\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.+)$")
_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NAMED = ("properties", "$defs", "patternProperties")


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The tool that a function is, in OpenAI's form.

    Its description is the first paragraph of its docstring; an ``Args:`` section describes the parameters.

    Raises:
        InvalidRequestError: it has no name, takes unnamed arguments, or has a type hint without a JSON schema.
    """
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"\w{1,64}", name, re.ASCII):
        raise InvalidRequestError(f"A tool function needs a name; {function!r} has none.", "tools")
    about = function if not isinstance(function, type) or "__doc__" in vars(function) else None  # a class inherits none
    text = (inspect.getdoc(about) or "") if about is not None else ""
    schema = _schema(function, name)
    for parameter, said in _described(text).items():
        if parameter in schema["properties"]:
            schema["properties"][parameter].setdefault("description", said)
    summary = " ".join(text.split("\n\n")[0].split())
    told = {"description": summary} if summary and not _SECTION.match(text) else {}
    return {"type": "function", "function": {"name": name, **told, "parameters": schema}}


def is_hint(value: object) -> bool:
    """Whether it is a class or another type hint rather than a schema."""
    return isinstance(value, type) or typing.get_origin(value) is not None


def schema_of(hint: Any, param: str) -> Schema:
    """The JSON schema of a type hint: a pydantic model, a dataclass, ``list[int]`` …

    Raises:
        InvalidRequestError: there is none.
    """
    from pydantic import TypeAdapter

    try:
        return _tidied(TypeAdapter(hint).json_schema())
    except Exception as cause:  # raised by the hint's own classes
        raise InvalidRequestError(f"{hint!r} in {param} has no JSON schema: {cause}", param) from cause


def bind_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, converted by the function's type hints to dates, enums, dataclasses or models.

    Raises:
        ValueError: they do not fit; the message names each invalid argument.
        InvalidRequestError: as ``describe_function``.
    """
    from pydantic import ValidationError

    try:
        made: dict[str, Any] = _adapter(function, getattr(function, "__name__", "")).validate_python(dict(arguments))
    except ValidationError as wrong:
        said = [f"{'.'.join(map(str, error['loc'])) or 'arguments'}: {error['msg']}" for error in wrong.errors()]
        raise ValueError("; ".join(said)) from None
    return made


def result_text(value: Any) -> str:
    """A function's result as text for the model: a string as it is, anything else as JSON.

    Raises:
        TypeError: it cannot be written as JSON.
    """
    if type(value) is str:
        return value
    from pydantic_core import PydanticSerializationError, to_json

    try:
        said = to_json(value, inf_nan_mode="null", fallback=_plain).decode()
    except (PydanticSerializationError, ValueError, RecursionError) as cause:
        raise TypeError(f"The result of a tool must be a string or JSON: {cause}") from cause
    return (
        str(json.loads(said)) if said.startswith('"') else said
    )  # an enum or a date becomes the string that JSON has for it


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy, torch
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON; return strings, numbers, lists, dicts or dataclasses")


def _schema(function: Callable[..., Any], name: str) -> Schema:
    try:
        schema = _tidied(_adapter(function, name).json_schema())
        json.dumps(schema, allow_nan=False)
    except InvalidRequestError:
        raise
    except Exception as cause:  # a hint without a schema, or one whose own code fails
        raise InvalidRequestError(f"The parameters of {name} have no JSON schema: {cause}", "tools") from cause
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default not in (parameter.empty, None) and _is_json(parameter.default):
            schema["properties"][parameter.name].setdefault("default", parameter.default)
    return schema


def _adapter(function: Callable[..., Any], name: str) -> Any:
    """The pydantic adapter that validates a call's arguments as a dict."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import TypedDict

    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = typing.get_type_hints(function, include_extras=True) if not isinstance(function, type) else {}
    except Exception as cause:  # raised by the hints' own classes
        raise InvalidRequestError(f"The signature of {name} cannot be read: {cause}", "tools") from cause
    for parameter in parameters:
        if parameter.kind not in _KINDS:
            raise InvalidRequestError(f"{name} takes {parameter}, but a tool's arguments must have names.", "tools")
    taken = TypedDict("taken", {each.name: _field(each, hints) for each in parameters})  # type: ignore[misc]
    taken.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(taken)


def _field(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    hint = hints.get(parameter.name, parameter.annotation)
    if hint is parameter.empty:
        hint = Any
    notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)]
    if notes:
        from pydantic import Field

        hint = Annotated[hint, Field(description=" ".join(notes))]
    return hint if parameter.default is parameter.empty else NotRequired[hint]


def _tidied(schema: Schema) -> Schema:
    """The schema without titles, which repeat names; objects allow no other properties."""
    return {key: _inside(key, value) for key, value in _closed(schema).items() if key != "title"}


def _inside(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, dict):
        return {name: _inside("", inner) for name, inner in value.items()}
    if isinstance(value, dict) and key not in ("default", "const", "examples"):
        return _tidied(value)
    return [_inside("", inner) for inner in value] if isinstance(value, list) and key != "enum" else value


def _closed(schema: Schema) -> Schema:
    return {**schema, "additionalProperties": False} if _is_open(schema) else schema


def _is_open(schema: Schema) -> bool:
    return schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _described(text: str) -> dict[str, str]:
    """The description of each parameter in a docstring's ``Args:`` section."""
    found = _SECTION.search(text)
    said: dict[str, str] = {}
    last = ""
    for line in _section_lines(text[found.end() :]) if found else ():
        entry = _ENTRY.match(line)
        if entry:
            last = entry[1]
            said[last] = entry[2].strip()
        elif line.strip() and last:
            said[last] += f" {line.strip()}"
    return said


def _section_lines(text: str) -> Iterator[str]:
    for line in text.splitlines()[1:]:
        if line and not line[0].isspace():
            return
        yield line
