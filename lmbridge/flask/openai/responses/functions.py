"""Converts the flat tools of responses into those of chats.

Rule: pure functions of the client's JSON. ``lmbridge.tools`` checks the definition of each function.
"""

from __future__ import annotations

from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.fields import BOOL, Fields, wrong
from lmbridge.tools import read_choice, read_tools

TOOL = '{"type": "function", "name": "…", "parameters": {…}}'
_TOLD = ("name", "description", "parameters", "strict")


def read_flat(tools: list[Any]) -> list[dict[str, Any]]:
    """Read the functions.

    Raises:
        InvalidRequestError: a tool is not a function or is malformed; the message has its path, such as
            ``tools[0].type``.
    """
    nested = [_nested(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    try:
        read_tools(nested)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error).replace("].function.", "].", 1), "tools") from None
    return nested


def nested_choice(choice: Any) -> str | dict[str, Any] | None:
    """Convert a ``tool_choice`` to the form of chats; None if it is invalid."""
    if not isinstance(choice, dict):
        return read_choice(choice)
    if choice.get("type") == "function":
        return read_choice(_chosen(choice))
    tools = choice.get("tools")
    listed = [_chosen(tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    if choice.get("type") != "allowed_tools" or not isinstance(tools, list) or len(listed) < len(tools):
        return None
    return read_choice({"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": listed}})


def told_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked tools in the form in which the answer repeats them."""
    return [{"type": "function", **{name: tool.get(name) for name in _TOLD}} for tool in tools]


def told_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    """A checked choice in the form in which the answer repeats it."""
    if isinstance(choice, str):
        return choice
    told = ("type", "name") if choice["type"] == "function" else ("type", "mode", "tools")
    return {name: choice[name] for name in told}


def _nested(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(path, TOOL, tool)
    if tool.get("type") != "function":
        raise wrong(f"{path}.type", '"function" (other tools are not supported)', tool.get("type"))
    Fields(tool, f"{path}.").take("strict", BOOL)
    return {"type": "function", "function": {name: tool[name] for name in _TOLD if tool.get(name) is not None}}


def _chosen(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.get("name")}}
