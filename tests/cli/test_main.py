"""The command line itself: help, version, and what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lmbridge
from lmbridge.cli.terminal import guarded

if TYPE_CHECKING:
    from tests.cli.conftest import Open, Run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "chat", "bench", "--version"]),
        (["demo", "--help"], ["Eight threads", "--threads", "--model", "--engine", "--option"]),
        (["run", "--help"], ["SCRIPT", "--engine", "--model"]),
        (["chat", "--help"], ["Ctrl-C", "Ctrl-D", "--system", "--max-new-tokens", "--temperature", "--seed"]),
    ],
)
def test_help(run: Run, arguments: list[str], words: list[str]) -> None:
    """--help of every command says what the command does and names its options."""
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version(run: Run) -> None:
    """--version says which lmbridge this is."""
    assert run("--version").stdout == f"lmbridge {lmbridge.__version__}\n"


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (2, [], ["COMMAND", "lmbridge --help"]),
        (2, ["dmo"], ["dmo", "demo", "chat"]),
        (2, ["demo", "--threads", "99"], ["--threads", "99", "16"]),
        (2, ["demo", "--no-such-flag"], ["--no-such-flag"]),
        (2, ["chat", "--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (2, ["chat", "--option", "device"], ["device", "NAME=VALUE", "lmbridge chat --help"]),
        (1, ["chat", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (1, ["chat", "./no-such-folder"], ["no-such-folder"]),
        (1, ["demo", "--model", "./no-such-folder"], ["no-such-folder"]),
        (1, ["chat", "--engine", "no-such-engine"], ["no-such-engine", "transformers"]),
        (1, ["chat", "--option", "no_such_option=1"], ["no_such_option"]),
    ],
)
def test_mistakes(run: Run, status: int, arguments: list[str], words: list[str]) -> None:
    """A mistake is told in one line that names it, not by a traceback, and by the exit status."""
    done = run(*arguments)
    assert done.returncode == status
    assert_one_line(done.stderr, words)
    assert done.stdout == ""


def test_a_model_that_cannot_be_loaded(run: Run, tmp_path: Path) -> None:
    """What fails only while loading is told in one line too, without what libraries log about it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = run("chat", str(tmp_path))
    assert done.returncode == 1
    assert_one_line(done.stderr, ["could not be loaded"])


def test_ctrl_c_while_the_model_loads(terminal: Open) -> None:
    """Ctrl-C during a long load leaves at once and quietly, with the cursor visible again."""
    with terminal("demo") as command:
        command.read_until("Loading the model demo")
        command.send("\x03")
        assert command.exit_status() == 130
        assert "Traceback" not in command.shown
        assert command.raw.rindex("\x1b[?25h") > command.raw.rindex("\x1b[?25l")


def test_ctrl_c_that_strikes_a_finalizer() -> None:
    """Python loses an exception that is raised there: the command would go on to its end, and report success."""
    source = """
        import os, signal
        from lmbridge import Bridge
        from lmbridge.cli import terminal
        from lmbridge.testing import ScriptedEngine

        class Struck:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    pass

        class Slow(Bridge):
            def start(self, timeout=None):
                Struck()
                return super().start(timeout)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal._load(Slow(ScriptedEngine), "demo", quiet=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_what_nobody_expected(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of our own is one line too, which says how to see where it happened."""

    def fails() -> int:
        raise RuntimeError("one\ntwo")

    assert guarded(fails) == 1
    assert_one_line(capsys.readouterr().err, ["RuntimeError", "LMBRIDGE_TRACEBACK=1"])
    monkeypatch.setenv("LMBRIDGE_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        guarded(fails)


def test_importing_the_commands_is_cheap(run: Run) -> None:
    """``lmbridge --help`` answers at once: no heavy library is imported to parse the command line."""
    heavy = "[name for name in ('torch', 'transformers', 'flask', 'rich') if name in sys.modules]"
    done = run(command=[sys.executable, "-c", f"import sys, lmbridge.cli; print({heavy})"])
    assert done.stdout == "[]\n"


def assert_one_line(text: str, words: list[str]) -> None:
    assert text.startswith("lmbridge: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    assert [word for word in words if word not in text] == []
