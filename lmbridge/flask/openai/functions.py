"""Reads tools in the form of OpenAI's chats: the client's own functions, and no tools that a server would run.

Rule: pure functions of the client's JSON. ``lmbridge.tools`` checks the definition of each function.
"""

from __future__ import annotations

from typing import Any

from lmbridge.flask.openai.fields import wrong
from lmbridge.tools import is_forced

CALLING = ("tools", "tool_choice", "parallel_tool_calls")
"""GenerationConfig's fields for tool calls."""


def read_functions(tools: list[Any]) -> list[Any]:
    """Read the tools, all functions, without null members, which templates would show to the model.

    Raises:
        InvalidRequestError: a tool is not a function; ``param`` is its path, such as ``tools[0].type``.
    """
    return [_read_function(tool, f"tools[{place}]") for place, tool in enumerate(tools)]


def drop_idle(options: dict[str, Any]) -> None:
    """Remove options without effect.

    These are tools that must not be called, ``tool_choice`` without tools, and ``response_format`` if the answer can
    only be calls: agents send the format of their final answer with every step.
    """
    choice = options.get("tool_choice")
    if choice == "none" or ("tools" not in options and choice is None):
        for name in CALLING:
            options.pop(name, None)
    elif is_forced(choice):
        options.pop("response_format", None)


def _read_function(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(path, "an object with type and function", tool)
    if tool.get("type") != "function":
        raise wrong(f"{path}.type", '"function" (other tools are not supported)', tool.get("type"))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{path}.function", "an object with name and parameters", function)
    return {**tool, "function": {name: value for name, value in function.items() if value is not None}}
