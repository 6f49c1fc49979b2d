"""Tools as OpenAI's chats describe them: functions of the client's, and nothing that a server would run.

Rule: pure functions of the client's JSON. What a tool says of its function is checked by ``lmbridge.tools``.
"""

from __future__ import annotations

from typing import Any

from lmbridge.flask.openai.fields import wrong
from lmbridge.tools import is_forced

CALLING = ("tools", "tool_choice", "parallel_tool_calls")
"""GenerationConfig's fields about calls."""


def read_functions(tools: list[Any]) -> list[Any]:
    """The tools, each of which is a function, without what is null, which templates would show to the model.

    Raises:
        InvalidRequestError: one of them is none; ``param`` is the place, such as ``tools[0].type``.
    """
    return [_read_function(tool, f"tools[{place}]") for place, tool in enumerate(tools)]


def drop_idle(options: dict[str, Any]) -> None:
    """Leave out what asks for nothing.

    Tools that must not be called, how to call where there are none, and the form of a text where all that may come is
    calls: agents give their answer's form with every step.
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
        raise wrong(f"{path}.type", '"function" (no other tools are supported here)', tool.get("type"))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{path}.function", "an object with name and parameters", function)
    return {**tool, "function": {name: value for name, value in function.items() if value is not None}}
