"""``lmbridge demo``: what it shows, and that its exit status can be believed."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from lmbridge import Bridge, EngineError, Request
from lmbridge.cli import demo
from lmbridge.cli.demo_view import Panels, PlainView, fill
from lmbridge.testing import ScriptedEngine, prompt_text

if TYPE_CHECKING:
    from tests.cli.conftest import Open, Run

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]
WORDS = dict(demo.QUESTIONS)


def right_answer(request: Request) -> list[str]:
    """Ten tokens for a question, a hundred for a story, with the word that tells whose answer it is."""
    prompt = prompt_text(request.prompt)
    rest = [" and", " so", " on"] * (33 if "story" in prompt else 3)
    return [WORDS.get(prompt, "Hello"), *rest]


@pytest.mark.long
def test_plain(run: Run) -> None:
    """Where stdout is no terminal, the demo prints whole lines, says what it measured, and exits with 0."""
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for number, (prompt, word) in enumerate(demo.QUESTIONS[:8], start=1):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"thread {number} ")]
        assert prompt in lines[0]
        assert demo.says(" ".join(lines[1:]), word)
    measured_and_right(done.stdout)
    assert "\nEvery one of the 16 answers reached its own thread.\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.long
def test_in_a_terminal(terminal: Open) -> None:
    """In a terminal of 80 by 24 the answers grow side by side, and the measurements stand below."""
    with terminal("demo") as command:
        command.read_until("Loading the model demo")
        command.read_until("8 threads ask one model at once")
        command.read_until("╭─ 1 Write a long story about a fox.")
        command.read_until("╭─ 8 What is the opposite of friend?")
        command.read_until("one at a time behind a lock")
        status = command.exit_status()
    assert status == 0, command.shown
    measured_and_right(command.shown)
    assert "Every one of the 16 answers reached its own thread. Next: python -m lmbridge chat" in command.shown


def measured_and_right(text: str) -> None:
    """The ratio is there, and the engine stopped soon after an answer was left."""
    line = " ".join(text.split())
    assert re.search(r"Sharing the model was \d+\.\d times as fast here", line)
    counts = r"left its stream after (\d+) of (\d+) tokens: the engine generated (\d+) of them, and saved (\d+)"
    left = re.search(counts, line)
    assert left, line
    seen, whole, made, saved = map(int, left.groups())
    assert seen <= made <= seen + 5
    assert whole - made == saved > 50


@pytest.mark.parametrize(
    ("typed", "path", "shown"),
    [
        ("/opt/bin/lmbridge", "/opt/bin", "lmbridge chat"),
        (".venv/bin/lmbridge", "/usr/bin", ".venv/bin/lmbridge chat"),
        ("/somewhere/lmbridge/__main__.py", "/usr/bin", "python -m lmbridge chat"),
    ],
)
def test_what_to_try_next(monkeypatch: pytest.MonkeyPatch, typed: str, path: str, shown: str) -> None:
    """The commands that are named work as they stand, though most newcomers have not activated the environment."""
    monkeypatch.setattr("sys.argv", [typed, "demo"])
    monkeypatch.setattr("shutil.which", lambda name: typed if path == "/opt/bin" else None)
    lines = [line.strip() for line in demo.what_next(" './my model'").splitlines()]
    assert lines[2].startswith(f"{shown} './my model'  ")


def test_every_thread_count(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """--threads may be anything from 1 to the number of questions."""
    bridge, _ = scripted(ScriptedEngine(right_answer))
    for threads in (1, len(demo.QUESTIONS)):
        assert demo.show(bridge, threads, PlainView())
        assert f"Every one of the {2 * threads} answers" in capsys.readouterr().out


def test_tokens_saved(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens said to be saved are those that the engine did not make."""
    bridge, engine = scripted(ScriptedEngine(right_answer, step_time=0.001))
    assert demo.show(bridge, 8, PlainView())
    measured_and_right(capsys.readouterr().out)
    assert len(engine.aborted) == 1


def test_crossed_answers(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """Two threads that get each other's answer are found out, named, and make the demo fail."""
    crossed = {"What is the capital of France?": "85", "What is 37 + 48?": "Paris"}

    def answer(request: Request) -> list[str]:
        return [crossed.get(prompt_text(request.prompt), " ".join(right_answer(request)))]

    bridge, _ = scripted(ScriptedEngine(answer))
    assert not demo.show(bridge, 8, PlainView())
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert first == "thread 2 asked 'What is the capital of France?' and got '85', the answer of thread 4"
    assert second == "thread 4 asked 'What is 37 + 48?' and got 'Paris', the answer of thread 2"
    assert last == "4 of 16 answers did not reach their own thread."


def test_another_model(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose answers lack the bundled model's words would fail a demo in which nothing is wrong."""
    bridge, _ = scripted(ScriptedEngine(lambda request: ["I will not say:", f" {prompt_text(request.prompt)}"]))
    assert demo.show(bridge, 8, PlainView(), tokens=64, words=False)
    assert "Every one of the 16 answers" in capsys.readouterr().out


def test_crossed_answers_of_another_model(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no right answer is known, an answer that another thread should have had is found out all the same."""
    seen: set[str] = set()

    def answer(request: Request) -> list[str]:
        prompt = prompt_text(request.prompt)
        crossed = prompt == "What is the capital of France?" and prompt not in seen
        seen.add(prompt)
        return ["This is about ", "What is 37 + 48?" if crossed else prompt, *[" and"] * 20]

    bridge, _ = scripted(ScriptedEngine(answer))
    assert not demo.show(bridge, 8, PlainView(), words=False)
    *_, which, last = capsys.readouterr().out.splitlines()
    assert which.startswith("thread 2 asked 'What is the capital of France?' and got 'This is about What is 37 + 48?")
    assert which.endswith(", the answer of thread 4")
    assert last == "1 of 16 answers did not reach their own thread."


def test_a_failed_answer(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """A thread whose request fails is named with the reason, and the demo fails."""
    bridge, engine = scripted(ScriptedEngine(right_answer))
    engine.refuse("What is 37 + 48?", EngineError("out of\nfingers"))
    assert not demo.show(bridge, 8, PlainView())
    *_, which, last = capsys.readouterr().out.splitlines()
    assert which == "thread 4 asked 'What is 37 + 48?' and got an error: out of fingers"
    assert last == "1 of 16 answers did not reach their own thread."


def test_words_tell_answers_apart() -> None:
    """No question's word is in another's prompt or is another's word, so no answer can pass for another."""
    for prompt, word in demo.QUESTIONS:
        others = [other for other in demo.QUESTIONS if other != (prompt, word)]
        assert [other for other in others if demo.says(" ".join(other), word)] == []


@pytest.mark.parametrize("threads", range(1, len(demo.QUESTIONS) + 1))
def test_panels_fit_a_small_terminal(threads: int) -> None:
    """All panels are seen at once in 80 columns and 24 rows, however many threads there are."""
    turns = demo.new_turns(threads)
    for turn in turns:
        turn.text = "word " * 200
    console = Console(file=io.StringIO(), width=80, height=24)
    lines = console.render_lines(Panels("title", turns, console.height), pad=False)
    assert len(lines) <= 22
    assert max(sum(segment.cell_length for segment in line) for line in lines) <= 80


def test_plain_lines_lose_nothing() -> None:
    """Plain lines are whole words, never too long, and joined they are the answer."""
    text, lines, rest = "one two three four\n\nsupercalifragilistic five", [], ""
    for letter in text:
        full, rest = fill(rest + letter, 9)
        lines += full
    assert [*lines, rest] == ["one two", "three", "four", "supercali", "fragilist", "ic five"]


def test_reader_that_leaves(scripted_command: list[str]) -> None:
    """``lmbridge demo | head`` ends quietly once head has left."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*scripted_command, "demo"], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_a_model_drives_no_terminal(terminal: Open, scripted_command: list[str]) -> None:
    """An answer that sets the terminal's title is text in its panel."""
    with terminal("demo", command=scripted_command) as command:
        command.read_until("\N{REPLACEMENT CHARACTER}]0;owned")
        assert "\x1b]0;" not in command.raw


def test_ctrl_c(terminal: Open, scripted_command: list[str]) -> None:
    """Ctrl-C in the middle of the answers ends the demo with status 130 and without a traceback."""
    with terminal("demo", command=scripted_command) as command:
        command.read_until("and again")
        command.send("\x03")
        assert command.exit_status() == 130
        assert "Traceback" not in command.shown
