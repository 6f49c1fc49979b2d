"""Talk with a model: answers stream in, and the conversation is remembered.

Ctrl-C stops an answer, and that turn is forgotten. Ctrl-D or /exit leaves, and
/help lists what else may be typed. A message of several lines begins and ends
with three quotation marks (\"\"\").

Lines from a pipe are answered one after another; only answers are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lmbridge.cli import values
from lmbridge.cli.faults import in_words
from lmbridge.cli.model import add_model_arguments, loaded
from lmbridge.cli.terminal import complain
from lmbridge.errors import BridgeClosedError, LMBridgeError, PromptTooLongError
from lmbridge.messages import FinishReason, GenerationConfig, Message

if TYPE_CHECKING:
    from lmbridge.chat import Chat

SUMMARY = "talk with a model"
USAGE = "[OPTION ...] [MODEL]"
EXAMPLES = """\
  lmbridge chat
  lmbridge chat ./my-model --system "Answer in one sentence." --temperature 0.7
  echo "What is the capital of France?" | lmbridge chat
"""
PROMPT, MORE = "you> ", "...> "
QUOTES = '"""'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("the answers")
    group.add_argument("--system", metavar="TEXT", help="a system message: how the model is to answer")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=values.positive, default=512, help="tokens in an answer (default: 512)"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=values.number,
        help="0 takes the likeliest token, more draws at random (default: 0)",
    )
    group.add_argument("--top-p", metavar="P", type=values.share, help="draw from the likeliest tokens only, up to 1")
    group.add_argument("--seed", metavar="N", type=values.count, help="the same seed draws the same tokens")


def run(arguments: argparse.Namespace) -> int:
    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        random_seed=arguments.seed,
    )
    with loaded(arguments, quiet=True) as bridge:
        chat = bridge.chat(config, system=arguments.system)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return 0 if answer_each(chat, sys.stdin) else 1
        print(f"Talking with {arguments.model}. Ctrl-C stops an answer, /help lists commands, Ctrl-D leaves.")
        converse(chat)
        return 0


# --- reading ---


def answer_each(chat: Chat, lines: Iterable[str]) -> bool:
    """Answer lines from a pipe or a file; whether every one could be answered."""
    source, good = iter(lines), True

    def read(prompt: str) -> str:
        try:
            return next(source).removesuffix("\n")
        except StopIteration:
            raise EOFError from None

    with contextlib.suppress(EOFError):
        while (text := message(read)) is not None:
            good &= turn(chat, text)
    return good


def converse(chat: Chat) -> None:
    """Answer what the user types, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    while True:
        try:
            text = message(input)
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if text is None:
            print()
            return
        try:
            turn(chat, text)
        except KeyboardInterrupt:
            print("(stopped; this turn is forgotten)")
        except EOFError:
            return


def message(read: Callable[[str], str]) -> str | None:
    """The next message, which quotation marks make one of several lines; None at the end of the input.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end.
    """
    try:
        text = read(PROMPT)
        while text.startswith(QUOTES) and (text.strip() == QUOTES or not text.rstrip().endswith(QUOTES)):
            text += f"\n{read(MORE)}"
    except EOFError:
        return None
    return text


# --- answering ---


def turn(chat: Chat, text: str) -> bool:
    """Do what one message asks for. An error is one line on stderr and False, and the conversation goes on.

    Raises:
        KeyboardInterrupt: it was stopped; the engine is free again and the turn forgotten.
        BridgeClosedError: there is nobody left to talk with.
        EOFError: the user wants to leave.
    """
    if text.startswith("/"):
        return obey(chat, text)
    if text.startswith(QUOTES):
        text = text.strip().removeprefix(QUOTES).removesuffix(QUOTES)
    try:
        if text.strip() and print_answer(chat, text.strip()) == "length":
            complain("the answer was cut off: raise --max-new-tokens, or empty a full context with /clear")
        return True
    except BridgeClosedError:
        raise
    except LMBridgeError as error:
        advice = " /clear begins a new conversation." if isinstance(error, PromptTooLongError) else ""
        complain(f"{in_words(error)}{advice}")
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


# --- what begins with a slash ---


def obey(chat: Chat, line: str) -> bool:
    """Run a command of the chat; whether there is such a one."""
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        hint = values.did_you_mean(name, COMMANDS)
        complain(f"there is no command {name}{hint or '; /help lists them'}")
        return False
    command(chat, rest.strip())
    return True


def _help(chat: Chat, rest: str) -> None:
    print(HELP)


def _clear(chat: Chat, rest: str) -> None:
    chat.reset()
    print("(the conversation is forgotten)")


def _system(chat: Chat, rest: str) -> None:
    """Set the system message, which all turns to come are told first; or show it."""
    now, others = _split(chat.messages)
    if rest:
        chat.messages = [{"role": "system", "content": rest}, *others]
        print("(the system message is set)")
    else:
        print(now[0]["content"] if now else "(no system message; /system TEXT sets one)")


def _split(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, and what was said."""
    first = 1 if conversation and conversation[0]["role"] == "system" else 0
    return conversation[:first], conversation[first:]


def _exit(chat: Chat, rest: str) -> None:
    raise EOFError


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": _help,
    "/clear": _clear,
    "/reset": _clear,
    "/system": _system,
    "/exit": _exit,
    "/quit": _exit,
}
HELP = """\
/help          this list
/clear         forget the conversation; the system message stays
/system TEXT   set the system message; without TEXT, show it
/exit          leave, as Ctrl-D does
\"""            begins and ends a message of several lines
Ctrl-C stops an answer. Put a blank before a message that begins with a slash."""
