"""A model calls a Python function: the chat runs it and tells the model what it gave.

Run it with ``python examples/tools.py``. The bundled model cannot choose to call, so ``tool_choice`` forces it to;
``Bridge("Qwen/Qwen3-0.6B")`` decides by itself, without it.
"""

from __future__ import annotations

from typing import Literal

from lmbridge import Bridge


def stock(item: Literal["apples", "pears", "plums"]) -> dict[str, object]:
    """Tell how many of something are left."""
    print(f"stock({item!r}) is called")
    return {"item": item, "left": 7}


if __name__ == "__main__":
    with Bridge("demo") as bridge:
        chat = bridge.chat()
        answer = chat.ask("Are there any apples left?", tools=[stock], tool_choice="required", max_new_tokens=60)
        print(f"The model says: {answer.text}")
