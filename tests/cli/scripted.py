"""Run by tests in a process of its own: a command's inside on a scripted engine whose stories never end."""

from __future__ import annotations

import sys

from lmbridge import Bridge, Request
from lmbridge.cli import chat, demo, terminal
from lmbridge.cli.demo_view import choose_view
from lmbridge.testing import ScriptedEngine, prompt_text

TITLE = "\x1b]0;owned\x07"  # sets a terminal's title


def endless(request: Request) -> list[str]:
    """A short answer, to a question one that would drive the terminal, and to a story one that nobody waits for."""
    text = prompt_text(request.prompt)
    return ["Once ", *["and again "] * 10_000] if "story" in text else [f"You said {text}.", TITLE * text.endswith("?")]


def run_demo() -> int:
    with Bridge(ScriptedEngine(endless, step_time=0.05)) as bridge:
        demo.show(bridge, 8, choose_view())
    return 0


def run_chat() -> int:
    engine = ScriptedEngine(endless, step_time=0.05)
    with Bridge(engine) as bridge:
        conversation = bridge.chat()
        chat.converse(conversation)
        engine.wait_for(lambda engine: engine.active == 0)
        print(f"aborted {len(engine.aborted)}, active {engine.active}")
        print("remembered:", [message["content"] for message in conversation.messages])
    return 0


if __name__ == "__main__":
    raise SystemExit(terminal.guarded({"demo": run_demo, "chat": run_chat}[sys.argv[1]]))
