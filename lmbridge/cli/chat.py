"""Chat with a model: answers stream, and the model remembers the conversation.

Ctrl-C stops an answer and drops that turn from the conversation. Ctrl-D or
/exit leaves; /help lists the other commands. Begin and end a message of several
lines with three quotation marks (\"\"\").

If stdin is a pipe, each line gets an answer; only the answers are printed.
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
from lmbridge.cli.terminal import complain, is_terminal, printable
from lmbridge.errors import BridgeClosedError, LMBridgeError, PromptTooLongError
from lmbridge.messages import FinishReason, GenerationConfig, Message

if TYPE_CHECKING:
    from lmbridge.chat import Chat

SUMMARY = "chat with a model"
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
    group.add_argument("--system", metavar="TEXT", help="a system message: how the model should answer")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=values.positive, default=512, help="most tokens per answer (default: 512)"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=values.number,
        help="0 takes the likeliest token; higher values sample more randomly (default: 0)",
    )
    group.add_argument(
        "--top-p", metavar="P", type=values.share, help="sample from the likeliest tokens only, of total probability P"
    )
    group.add_argument("--seed", metavar="N", type=values.count, help="the same seed samples the same tokens")


def run(arguments: argparse.Namespace) -> int:
    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        random_seed=arguments.seed,
    )
    with loaded(arguments, quiet=True) as bridge:
        chat = bridge.chat(config, system=arguments.system)
        if not is_terminal(sys.stdin, sys.stdout):
            return 0 if answer_each(chat, sys.stdin) else 1
        print(f"Chatting with {arguments.model}. Ctrl-C stops an answer, /help lists commands, Ctrl-D leaves.")
        converse(chat)
        return 0


# --- reading ---


def answer_each(chat: Chat, lines: Iterable[str]) -> bool:
    """Answer the lines of a pipe or file; return whether all could be answered."""
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
            print("(stopped; the model forgets this turn)")
        except EOFError:
            return


def message(read: Callable[[str], str]) -> str | None:
    """Read the next message, of several lines if it begins with quotation marks; None at the end of the input.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end.
    """
    try:
        text = read(PROMPT)
    except EOFError:
        return None
    with contextlib.suppress(EOFError):  # the end of the input ends the message, too
        while text.startswith(QUOTES) and (text.strip() == QUOTES or not text.rstrip().endswith(QUOTES)):
            text += f"\n{read(MORE)}"
    return text


# --- answering ---


def turn(chat: Chat, text: str) -> bool:
    """Handle one message. An error prints one line on stderr and returns False; the conversation goes on.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped the answer; the engine is free again and the turn dropped.
        BridgeClosedError: the bridge is closed.
        EOFError: the user leaves.
    """
    if text.startswith("/"):
        return obey(chat, text)
    if text.startswith(QUOTES):
        text = text.strip().removeprefix(QUOTES).removesuffix(QUOTES)
    try:
        if text.strip() and print_answer(chat, text.strip()) == "length":
            complain("the answer was cut off: raise --max-new-tokens, or type /clear if the context is full")
        return True
    except BridgeClosedError:
        raise
    except LMBridgeError as error:
        advice = " Type /clear to start a new conversation." if isinstance(error, PromptTooLongError) else ""
        complain(f"{in_words(error)}{advice}")
        return False


def print_answer(chat: Chat, text: str) -> FinishReason | None:
    """Print the answer as it arrives; return its finish reason."""
    reason: FinishReason | None = None
    shown = printable if is_terminal(sys.stdout) else str  # a pipe gets what the model wrote
    try:
        for delta in chat.stream(text):
            print(shown(delta.text), end="", flush=True)
            reason = delta.finish_reason
    finally:
        print(flush=True)
    return reason


# --- slash commands ---


def obey(chat: Chat, line: str) -> bool:
    """Run a slash command; return whether it exists."""
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        hint = values.did_you_mean(name, [known for known in COMMANDS if f"\n{known} " in f"\n{HELP}"])
        complain(f"unknown command {name[:40]}{hint or '; type /help for a list'}")
        return False
    command(chat, rest.strip())
    return True


def _help(chat: Chat, rest: str) -> None:
    print(HELP)


def _clear(chat: Chat, rest: str) -> None:
    chat.reset()
    print("(conversation cleared)")


def _system(chat: Chat, rest: str) -> None:
    """Set the system message for all further turns, or show it."""
    now, others = _split(chat.messages)
    if rest:
        chat.messages = [{"role": "system", "content": rest}, *others]
        print("(system message set)")
    else:
        print(now[0]["content"] if now else "(no system message; set one with /system TEXT)")


def _split(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, and the other messages."""
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
/help          show this list
/clear         clear the conversation, but keep the system message
/system TEXT   set the system message; without TEXT, show it
/exit          leave, like Ctrl-D
\"""            begins and ends a message of several lines
Ctrl-C stops an answer. To send a message that begins with a slash, type a space
before it."""
