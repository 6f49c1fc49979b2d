"""Talk with a model: answers stream in, and the conversation is remembered.

Ctrl-C stops an answer and frees the engine; that turn is forgotten.
/reset forgets the whole conversation. Ctrl-D leaves.
Lines from a pipe are answered one after another, without prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lmbridge.cli.terminal import MODEL_HELP, add_engine_arguments, complain, loaded
from lmbridge.errors import BridgeClosedError, LMBridgeError, PromptTooLongError
from lmbridge.messages import FinishReason, GenerationConfig

if TYPE_CHECKING:
    from lmbridge.chat import Chat

SUMMARY = "talk with a model"
PROMPT = "you> "
RESET = "/reset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", help=MODEL_HELP)
    add_engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="(default: 512)")
    parser.add_argument("--temperature", metavar="T", type=float, help="above 0: draw tokens at random")
    parser.add_argument("--top-p", metavar="P", type=float, help="draw from the likeliest tokens only")
    parser.add_argument("--seed", metavar="N", type=int, help="draw the same tokens each time")


def run(arguments: argparse.Namespace) -> int:
    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        random_seed=arguments.seed,
    )
    config.check()  # before the model is loaded
    with loaded(arguments, quiet=True) as bridge:
        chat = bridge.chat(config, system=arguments.system)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return 0 if answer_each(chat, sys.stdin) else 1
        print(f"Talking with {arguments.model}. Ctrl-C stops an answer, {RESET} forgets, Ctrl-D leaves.")
        converse(chat)
        return 0


def answer_each(chat: Chat, lines: Iterable[str]) -> bool:
    """Answer lines from a pipe or a file; whether every one could be answered."""
    answered = [turn(chat, line.strip()) for line in lines]
    return all(answered)


def converse(chat: Chat) -> None:
    """Answer what the user types, until Ctrl-D."""
    for line in typed_lines():
        try:
            turn(chat, line.strip())
        except KeyboardInterrupt:
            print("(stopped; this turn is forgotten)")


def typed_lines() -> Iterator[str]:
    """The lines that the user types."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    while True:
        try:
            line = input(PROMPT)
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        yield line


def turn(chat: Chat, text: str) -> bool:
    """Do what one line asks for. An error is one line on stderr and False, and the conversation goes on.

    Raises:
        KeyboardInterrupt: it was stopped; the engine is free again and the turn forgotten.
        BridgeClosedError: there is nobody left to talk with.
    """
    try:
        if text == RESET:
            chat.reset()
            print("(forgotten)")
        elif text and print_answer(chat, text) == "length":
            complain(f"the answer was cut off: --max-new-tokens, or a full context ({RESET} empties it)")
        return True
    except BridgeClosedError:
        raise
    except LMBridgeError as error:
        advice = f" ({RESET} begins a new conversation)" if isinstance(error, PromptTooLongError) else ""
        complain(f"{error}{advice}")
        return False


def print_answer(chat: Chat, text: str) -> FinishReason | None:
    """Print the answer as it grows, and say why it ended."""
    reason: FinishReason | None = None
    try:
        for delta in chat.stream(text):
            print(delta.text, end="", flush=True)
            reason = delta.finish_reason
    finally:
        print(flush=True)
    return reason
