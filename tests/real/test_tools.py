"""A real instruct model calls Python functions.

``python -m pytest -m real tests/real``; the first run fetches 93 MB.
"""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import Bridge, Chat

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def test_a_chat_runs_the_function_that_the_model_calls(bridge: Bridge) -> None:
    """Calls would be valid and senseless: the model's template knows no tools, so that lmbridge tells it of them."""
    seen: list[Any] = []

    def get_weather(city: str) -> dict[str, Any]:
        """Tell the weather in a city."""
        seen.append(city)
        return {"city": city, "sky": "sunny", "degrees": 23}

    def add(a: float, b: float) -> float:
        """Add two numbers."""
        seen.append((a, b))
        return a + b

    chat = Chat(bridge)
    options: dict[str, Any] = {"tools": [get_weather, add], "tool_choice": "required", "parallel_tool_calls": False}
    answer = chat.ask("What is the weather in Paris?", **options, max_new_tokens=80)
    assert seen == ["Paris"]
    assert "sunny" in answer.text
    chat.reset()
    answer = chat.ask("What is 31 plus 11?", **options, max_new_tokens=80)
    assert seen[1:] == [(31, 11)]
    assert "42" in answer.text
