"""Functions that a model may call: the caller's descriptions, validated and converted to plain values.

Rule: plain data, any thread. The engine knows how to describe them to the model and read its calls.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.signatures import describe_function
from lmbridge.values import as_list

Tool = dict[str, Any]
"""``{"type": "function", "function": {"name": "…", "description": "…", "parameters": {a JSON schema}}}``."""

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TOOL_CHOICES = '"auto", "none", "required" or {"type": "function", "function": {"name": "…"}}'


@dataclass(frozen=True)
class Calling:
    """What an answer may or must call.

    Attributes:
        tools: at least one.
        required: the answer consists of calls only.
        parallel: several calls are allowed.
    """

    tools: list[Tool]
    required: bool
    parallel: bool


class CheckedTools(list[Tool]):
    """Tools already validated."""


def read_tools(value: object) -> CheckedTools | None:
    """Plain tools from descriptions in OpenAI's form or Python functions; None if it is not a list.

    Raises:
        InvalidRequestError: one of them is malformed, or two share a name.
    """
    if isinstance(value, CheckedTools):
        return value
    given = as_list(value)
    if given is None or len(given) > MOST_TOOLS:
        return None
    tools = CheckedTools(_tool(item, f"tools[{place}]") for place, item in enumerate(given))
    names = [tool["function"]["name"] for tool in tools]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidRequestError(f"tools[{place}] is named {name!r}, like an earlier tool.", "tools")
    return tools


def read_choice(value: object) -> str | dict[str, Any] | None:
    """A plain copy of a ``tool_choice``; None if it is invalid."""
    if isinstance(value, str):
        return value if value in ("auto", "none", "required") else None
    if not isinstance(value, Mapping):
        return None
    if value.get("type") == "function":
        name = _name_in(value)
        return None if name is None else {"type": "function", "function": {"name": name}}
    allowed = value.get("allowed_tools")
    if value.get("type") != "allowed_tools" or not isinstance(allowed, Mapping):
        return None
    names = [_name_in(each) for each in as_list(allowed.get("tools")) or ()]
    if allowed.get("mode") not in ("auto", "required") or not names or None in names:
        return None
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": allowed["mode"], "tools": tools}}


def is_forced(choice: Any) -> bool:
    """Whether a ``tool_choice`` forces a call."""
    allowed = choice.get("allowed_tools") if isinstance(choice, Mapping) else None
    mode = allowed.get("mode") if isinstance(allowed, Mapping) else choice
    return mode not in (None, "auto", "none")


def read_calling(tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool) -> Calling | None:
    """What these plain fields ask for together; None if nothing may be called.

    Raises:
        InvalidRequestError: the chosen tool does not exist.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice needs tools: give tools, or leave it out.", "tools")
        return None
    if choice == "none":
        return None
    if choice is None or isinstance(choice, str):
        return Calling(tools, choice == "required", parallel)
    if choice["type"] == "function":
        return Calling(_chosen(tools, [choice["function"]["name"]]), True, False)
    allowed = choice["allowed_tools"]
    names = [tool["function"]["name"] for tool in allowed["tools"]]
    return Calling(_chosen(tools, names), allowed["mode"] == "required", parallel)


def _chosen(tools: list[Tool], names: list[str]) -> list[Tool]:
    known = {tool["function"]["name"]: tool for tool in tools}
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise InvalidRequestError(f"tool_choice names {name!r}, but the tools are {listed}.", "tool_choice")
    return [known[name] for name in dict.fromkeys(names)]


def _name_in(value: object) -> str | None:
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _tool(item: object, place: str) -> Tool:
    if isinstance(item, Callable):  # type: ignore[arg-type]
        return describe_function(item)  # type: ignore[arg-type]
    function = item.get("function") if isinstance(item, Mapping) and item.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise _wrong(place, '{"type": "function", "function": {"name": "…", "parameters": {…}}} or a function', item)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(f"{place}.function.name", "1 to 64 letters, digits, dots, _ and -", name)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _wrong(f"{place}.function.parameters", "a JSON schema: an object", parameters)
    if not isinstance(function.get("description", ""), (str, type(None))):
        raise _wrong(f"{place}.function.description", "a string", function["description"])
    if parameters is not None and parameters.get("type", "object") != "object":
        raise _wrong(f"{place}.function.parameters.type", '"object"', parameters["type"])
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(function), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidRequestError(f"{place} cannot be written as JSON: {cause}.", "tools") from None
    if not plain.get("parameters"):
        plain["parameters"] = {"type": "object", "properties": {}}
    return {"type": "function", "function": plain}


def _wrong(place: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{place} must be {expected}, not {reprlib.repr(value)}.", "tools")
