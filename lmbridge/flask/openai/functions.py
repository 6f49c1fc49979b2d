"""Tools as OpenAI's chats describe them: functions of the client's, and nothing that a server would run.

Rule: pure functions of the client's JSON. What a tool says of its function is checked by ``lmbridge.tools``.
"""

from __future__ import annotations

from typing import Any

from lmbridge.flask.openai.fields import wrong

CALLING = ("tools", "tool_choice", "parallel_tool_calls")
"""GenerationConfig's fields about calls."""


def read_functions(tools: list[Any]) -> list[Any]:
    """The tools, each of which is a function.

    Raises:
        InvalidRequestError: one of them is none; ``param`` is the place, such as ``tools[0].type``.
    """
    for place, tool in enumerate(tools):
        path = f"tools[{place}]"
        if not isinstance(tool, dict):
            raise wrong(path, "an object with type and function", tool)
        if tool.get("type") != "function":
            raise wrong(f"{path}.type", '"function" (no other tools are supported here)', tool.get("type"))
        if not isinstance(tool.get("function"), dict):
            raise wrong(f"{path}.function", "an object with name and parameters", tool.get("function"))
    return tools


def drop_idle(options: dict[str, Any]) -> None:
    """Leave out what asks for nothing: tools that must not be called, and how to call where there are none."""
    choice = options.get("tool_choice")
    if choice == "none" or ("tools" not in options and choice is None):
        for name in CALLING:
            options.pop(name, None)
