"""``lmbridge chat``: typed into, piped into, stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from lmbridge import Bridge, BridgeClosedError, GenerationConfig, InvalidRequestError, PromptTooLongError
from lmbridge.cli import chat
from lmbridge.testing import ScriptedEngine

if TYPE_CHECKING:
    from tests.cli.conftest import Open, Run

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


@pytest.mark.long
def test_piped(run: Run) -> None:
    """Questions from a pipe get their answers, a line each, and nothing else is printed."""
    done = run("chat", stdin="What is 37 + 48?\n\nWhat is the capital of Peru?\n")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert "85" in first
    assert "Lima" in second


@pytest.mark.long
def test_typed_and_stopped(terminal: Open) -> None:
    """With the bundled model: Ctrl-C stops a story, the next question is answered, Ctrl-D leaves."""
    with terminal("chat") as command:
        command.read_until("you> ")
        command.send("Tell me a long story about a fox.\n")
        command.read_until("fox.\r\n")
        command.read_until(" ")  # of the answer
        command.send("\x03")
        command.read_until("(stopped; the model forgets this turn)")
        command.read_until("you> ")
        command.send("What is the capital of France?\n")
        command.read_until("Paris")
        command.read_until("you> ")
        command.send("\x04")
        assert command.exit_status() == 0
        assert "Traceback" not in command.shown


def test_stopping_frees_the_engine(terminal: Open, scripted_command: list[str]) -> None:
    """Ctrl-C aborts the answer on the engine and leaves the turn out of the history."""
    with terminal("chat", command=scripted_command) as command:
        command.read_until("you> ")
        command.interrupt("(Ctrl-D leaves)")
        command.read_until("you> ")
        command.send("a story\n")
        command.read_until("and again")
        command.send("\x03")
        command.read_until("(stopped; the model forgets this turn)")
        command.read_until("you> ")
        command.send("hello\n")
        command.read_until("You said hello.")
        command.read_until("you> ")
        command.send("/hepl\n")
        command.read_until("did you mean /help?")
        command.read_until("you> ")
        command.send('"""good\n')
        command.read_until("...> ")
        command.send('night"""\n')
        command.read_until("You said good")
        command.read_until("you> ")
        command.send("/exit\n")
        command.read_until("aborted 1, active 0")
        command.read_until("remembered: ['hello', 'You said hello.', 'good\\nnight'")
        assert command.exit_status() == 0


def test_an_error_ends_one_turn_only(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """A turn that fails is one line on stderr; the next is answered, and a script sees that one failed."""
    bridge, engine = scripted()
    engine.refuse("bad", InvalidRequestError("not\nthis"))
    engine.refuse("long", PromptTooLongError("too long."))
    assert not chat.answer_each(bridge.chat(), ["good\n", "bad\n", "long\n", "\n", "better\n"])
    out, err = capsys.readouterr()
    assert out.split() == ["good", "better"]
    assert err.splitlines() == [
        "lmbridge: not this",
        "lmbridge: too long. Type /clear to start a new conversation.",
    ]


def test_an_answer_that_was_cut_off(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """An answer that hit the limit of its length says so, or it would look like the whole."""
    bridge, _ = scripted()
    assert chat.answer_each(bridge.chat(GenerationConfig(max_new_tokens=2)), ["one two three"])
    out, err = capsys.readouterr()
    assert out == "one two\n"
    assert "cut off" in err


@pytest.mark.parametrize("name", ["/clear", "/reset"])
def test_clear(scripted: Scripted, name: str) -> None:
    """/clear forgets the conversation but not the system message."""
    bridge, _ = scripted()
    conversation = bridge.chat(system="Be brief.")
    chat.answer_each(conversation, ["hello\n", f"{name}\n"])
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_system(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """/system sets and shows what the model is told first, and forgets nothing of the conversation."""
    bridge, _ = scripted()
    conversation = bridge.chat()
    lines = ["/system\n", "hello\n", "/system Be brief.\n", "/system Be  kind.\n", "/system\n", "again\n"]
    assert chat.answer_each(conversation, lines)
    assert [message["content"] for message in conversation.messages] == [
        "Be  kind.",
        "hello",
        "hello",
        "again",
        "again",
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "(no system message; set one with /system TEXT)"
    assert out[-2:] == ["Be  kind.", "again"]


def test_what_begins_with_a_slash(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """/help lists every command, a misspelt one is no message to the model, and /exit leaves what follows unread."""
    bridge, _ = scripted()
    conversation = bridge.chat()
    assert not chat.answer_each(
        conversation, ["/help\n", "/hepl\n", "/xyzzy\n", " /etc is a folder\n", "/exit\n", "no\n"]
    )
    out, err = capsys.readouterr()
    assert [name for name in ("/help", "/clear", "/system TEXT", "/exit", chat.QUOTES) if name not in out] == []
    assert [message["content"] for message in conversation.messages] == ["/etc is a folder"] * 2
    first, second = err.splitlines()
    assert "unknown command /hepl; did you mean /help?" in first
    assert "unknown command /xyzzy; type /help for a list" in second


def test_a_message_of_several_lines(scripted: Scripted) -> None:
    """What stands between quotation marks is one message with its line ends; one that the input's end cuts off, too."""
    bridge, _ = scripted()
    conversation = bridge.chat()
    lines = ['"""one\n', "\n", "/two\n", 'three"""\n', '"""four"""\n', '"""\n', "five\n", '"""\n', '"""unfinished\n']
    assert chat.answer_each(conversation, lines)
    asked = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert asked == ["one\n\n/two\nthree", "four", "five", "unfinished"]


def test_a_model_drives_no_terminal(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an answer nor a server's error changes a terminal's title, its clipboard or what stands on it."""
    monkeypatch.setattr(chat, "is_terminal", lambda *streams: True)
    bridge, engine = scripted(ScriptedEngine(lambda request: ["\x1b]0;title\x07", "fine\r\x9b2J\u202e", "\n\t."]))
    engine.refuse("bad", InvalidRequestError("no\x1b]52;c;Y2FsYw==\x07 thanks"))
    with bridge:
        conversation = bridge.chat()
        assert chat.turn(conversation, "hello")
        assert not chat.turn(conversation, "bad")
    shown = capsys.readouterr()
    assert "fine" in shown.out
    assert "thanks" in shown.err
    assert not {character for character in shown.out + shown.err if not character.isprintable()} - {"\n", "\t"}


def test_in_a_real_terminal_too(terminal: Open, scripted_command: list[str]) -> None:
    """An answer that sets the terminal's title is read as text by whoever chats."""
    with terminal("chat", command=scripted_command) as command:
        command.read_until("you> ")
        command.send("well?\n")
        command.read_until("You said well?.\N{REPLACEMENT CHARACTER}]0;owned")
        command.read_until("you> ")
        assert "\x1b]0;" not in command.raw


def test_a_pipe_gets_what_the_model_wrote(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that reads the answers gets every character of them."""
    bridge, _ = scripted(ScriptedEngine(lambda request: ["\x1b[1mbold\x1b[0m", "\x9b\u202e"]))
    assert chat.answer_each(bridge.chat(), ["hello"])
    assert capsys.readouterr().out == "\x1b[1mbold\x1b[0m\x9b\u202e\n"


def test_a_line_that_is_a_file(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """What begins with a slash and goes on for megabytes is neither echoed whole nor compared with every command."""
    bridge, _ = scripted()
    assert not chat.answer_each(bridge.chat(), ["/" + "a" * 3_000_000])
    assert len(capsys.readouterr().err) < 200


def test_a_bridge_that_is_closed_ends_the_conversation(scripted: Scripted) -> None:
    """When the bridge is gone the conversation ends, instead of failing at every line."""
    bridge, _ = scripted()
    bridge.close()
    with pytest.raises(BridgeClosedError):
        chat.answer_each(bridge.chat(), ["hello\n"] * 2)
