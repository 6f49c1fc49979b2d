"""A Python function as a tool: its description from its docstring, its parameters' schema from its type hints.

Rule: pure functions on the caller's thread. Imports nothing but what the function itself has imported.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NotRequired, Required, Union

from lmbridge.errors import InvalidRequestError

Schema = dict[str, Any]

_PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    inspect.Parameter.empty: {},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^\s*\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.+)$")
_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The tool that a function is, in OpenAI's form.

    Its description is the first paragraph of its docstring; what an ``Args:`` section says of a parameter goes with it.

    Raises:
        InvalidRequestError: it has no name, takes arguments that JSON cannot name, or has a hint that no schema says.
    """
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"\w{1,64}", name, re.ASCII):
        raise InvalidRequestError(f"A function that is a tool needs a name; {function!r} has none.", "tools")
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as cause:  # of what a hint names
        raise InvalidRequestError(f"The signature of {name} cannot be read: {cause}", "tools") from cause
    text = inspect.getdoc(function) or ""
    said = _described(text)
    properties: dict[str, Schema] = {}
    for parameter in parameters:
        if parameter.kind not in _KINDS:
            raise InvalidRequestError(f"{name} takes {parameter}; a tool's arguments all have names.", "tools")
        properties[parameter.name] = _property(name, parameter, hints, said)
    required = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    summary = " ".join(text.split("\n\n")[0].split())
    about = {"description": summary} if summary and not _SECTION.match(text) else {}
    return {"type": "function", "function": {"name": name, **about, "parameters": schema}}


def _property(name: str, parameter: inspect.Parameter, hints: Mapping[str, Any], said: Mapping[str, str]) -> Schema:
    try:
        schema = schema_of(hints.get(parameter.name, parameter.annotation))
    except TypeError as cause:
        raise InvalidRequestError(f"The parameter {parameter.name} of {name} {cause}.", "tools") from None
    if parameter.name in said:
        schema = {"description": said[parameter.name], **schema}
    return schema


def schema_of(hint: Any) -> Schema:
    """The JSON schema of a type hint.

    Raises:
        TypeError: there is none; the message goes on after the name of what has the hint.
    """
    if isinstance(hint, typing.Hashable) and hint in _PLAIN:
        return dict(_PLAIN[hint])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        notes = [note for note in arguments[1:] if isinstance(note, str)]
        return {**({"description": " ".join(notes)} if notes else {}), **schema_of(arguments[0])}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(each) for each in arguments]}
    return _collection(hint, origin, arguments) if origin is not None else _of_class(hint)


def _collection(hint: Any, origin: Any, arguments: tuple[Any, ...]) -> Schema:
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if arguments[0] is not str:
            raise TypeError(f"has the hint {hint!r}; the keys of a JSON object are str")
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    if origin is tuple and arguments[-1] is not Ellipsis:
        items = [schema_of(each) for each in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if isinstance(origin, type) and issubclass(origin, (Sequence, set, frozenset)):
        return {"type": "array", "items": schema_of(arguments[0])}
    raise TypeError(f"has the hint {hint!r}, which no JSON value has")


def _of_class(hint: Any) -> Schema:
    if hasattr(hint, "model_json_schema"):  # pydantic's
        schema: Schema = hint.model_json_schema()
        return schema
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if typing.is_typeddict(hint):
        return _of_typed_dict(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        fields = [field for field in dataclasses.fields(hint) if field.init]
        missing = dataclasses.MISSING
        needed = [field.name for field in fields if field.default is missing and field.default_factory is missing]
        return _object({field.name: hints[field.name] for field in fields}, needed)
    raise TypeError(f"has the hint {hint!r}, which no JSON value has; use str, int, float, bool, list, dict or Literal")


def _of_typed_dict(hint: Any) -> Schema:
    """Its own list of required keys is wrong where its annotations are texts."""
    hints: dict[str, Any] = {}
    required = []
    for name, kind in typing.get_type_hints(hint, include_extras=True).items():
        marked = typing.get_origin(kind) if typing.get_origin(kind) in (Required, NotRequired) else None
        hints[name] = typing.get_args(kind)[0] if marked else kind
        if marked is Required or (marked is None and hint.__total__):
            required.append(name)
    return _object(hints, required)


def _object(hints: Mapping[str, Any], required: list[str]) -> Schema:
    properties = {name: schema_of(hint) for name, hint in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _described(text: str) -> dict[str, str]:
    """What the ``Args:`` section of a docstring says of each parameter."""
    found = _SECTION.search(text)
    said: dict[str, str] = {}
    last = ""
    for line in text[found.end() :].splitlines()[1:] if found else ():
        entry = _ENTRY.match(line)
        if line and not line[0].isspace():
            break
        if entry:
            last = entry[1]
            said[last] = entry[2].strip()
        elif line.strip() and last:
            said[last] += f" {line.strip()}"
    return said


def bind_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments as the function's type hints want them: enums, dataclasses and pydantic's models are made.

    Raises:
        TypeError, ValueError: they are not what it takes.
    """
    inspect.signature(function).bind(**arguments)
    hints = typing.get_type_hints(function)
    return {name: _made(hints.get(name), value) for name, value in arguments.items()}


def _made(hint: Any, value: Any) -> Any:
    if hasattr(hint, "model_validate"):
        return hint.model_validate(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return hint(**value)
    return value
