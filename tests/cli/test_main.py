"""The command line itself: help, version, and what a mistake looks like."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lmbridge
from lmbridge import Bridge, BridgeClosedError, EngineStartError, PromptTooLongError, RequestTimeoutError
from lmbridge.cli.faults import in_words
from lmbridge.cli.terminal import LogFormatter, complain, guarded
from lmbridge.cli.values import option
from lmbridge.server.losses import start_error
from lmbridge.testing import ScriptedEngine
from tests.cli.conftest import ENVIRONMENT, LMBRIDGE

if TYPE_CHECKING:
    from tests.cli.conftest import Open, Run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "chat", "bench", "--version", "examples:"]),
        (["demo", "--help"], ["Eight threads", "MODEL", "--threads", "--engine", "--option", "(default: 8)"]),
        (["run", "--help"], ["SCRIPT", "--engine", "--model"]),
        (["serve", "--help"], ["MODEL", "--port", "(default: 8000)", "LMBRIDGE_API_KEYS", "--embed"]),
        (["doctor", "--help"], ["MODEL", "--try", "--all"]),
        (["chat", "--help"], ["Ctrl-C", "Ctrl-D", "--system", "--max-new-tokens", "--temperature", "--seed"]),
    ],
)
def test_help(run: Run, arguments: list[str], words: list[str]) -> None:
    """--help of every command says what the command does and names its options."""
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "examples:\n  lmbridge " in done.stdout


def test_no_command(run: Run) -> None:
    """Who types the bare name reads what there is; a script whose command is missing has failed all the same."""
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (2, run("--help").stdout, "")


def test_version(run: Run) -> None:
    """--version says which lmbridge this is."""
    assert run("--version").stdout == f"lmbridge {lmbridge.__version__}\n"


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (2, ["dmo"], ["unknown command 'dmo'; did you mean demo?", "`lmbridge --help`"]),
        (2, ["--verison"], ["--verison; did you mean --version?", "`lmbridge --help`"]),
        (2, ["demo", "--threads", "99"], ["--threads", "99", "16"]),
        (2, ["demo", "--thraeds", "3"], ["--thraeds; did you mean --threads?", "`lmbridge demo --help`"]),
        (2, ["demo", "--no-such-flag"], ["--no-such-flag"]),
        (2, ["demo", "--model", "x"], ["without --model", "`lmbridge demo MODEL`"]),
        (2, ["demo", "x", "y"], ["unexpected argument 'y'"]),
        (2, ["run"], ["missing: SCRIPT", "`lmbridge run --help`"]),
        (2, ["chat", ""], ["MODEL", "empty"]),
        (2, ["chat", "--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (2, ["chat", "--option", "device"], ["device", "NAME=VALUE", "lmbridge chat --help"]),
        (2, ["chat", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (2, ["chat", "--top-p", "1.5"], ["--top-p", "up to 1"]),
        (1, ["chat", "./no-such-folder"], ["no-such-folder"]),
        (1, ["demo", "./no-such-folder"], ["no-such-folder"]),
        (2, ["chat", "--engine", "no-such-engine"], ["no-such-engine", "transformers"]),
        (2, ["chat", "--engine", "transfomers"], ["did you mean transformers?", "`lmbridge chat --help`"]),
        (1, ["chat", "--option", "devise=cpu"], ["no devise; did you mean device?", "page_size"]),
        (
            1,
            ["chat", "--option", "max_batch_size=0"],
            ["--option: max_batch_size must be a whole number of at least 1"],
        ),
        (1, ["chat", "an_app:answer"], ["--engine function"]),
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
    assert "start anew" not in done.stderr


def test_long_mistakes_stay_short(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A file pasted for a command or a value is neither echoed whole nor a traceback; nor is a page from a server."""
    done = run("x" * 50_000)
    assert (done.returncode, len(done.stderr) < 1000) == (2, True)
    assert option("depth=" + "-" * 5000 + "1") == ("depth", "-" * 5000 + "1")
    complain("page " * 50_000)
    assert len(capsys.readouterr().err) < 3000


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """A service manager that closes stderr or stdin gets the answers, or an exit status, as anybody."""
    (tmp_path / "an_app.py").write_text("def answer(messages):\n    return messages[-1]['content'].upper()\n")
    command = (
        f"echo hello | {shlex.join(LMBRIDGE)} chat an_app:answer --engine function --option task=generate {closed}"
    )
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    answers = "" if "<" in closed else "HELLO\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, answers, "")


def test_a_terminal_without_stderr(terminal: Open, scripted_command: list[str]) -> None:
    """``lmbridge chat 2>&-``, typed by somebody who wants no notes, still asks and answers."""
    with terminal(command=["/bin/sh", "-c", f"{shlex.join(scripted_command)} chat 2>&-"]) as command:
        command.read_until("you> ")
        command.send("hello\n")
        command.read_until("You said hello.")


def test_a_log_drives_no_terminal() -> None:
    """What a client or another server sent is text in the server's log, tracebacks and their lines included."""
    record = logging.LogRecord("name", logging.ERROR, "path", 1, "asked %s\nto", ("\x1b]0;title\x07",), None)
    assert LogFormatter("%(message)s").format(record) == "asked \ufffd]0;title\ufffd\nto"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (start_error(MemoryError()), "The model could not be loaded: there is not enough memory;"),
        (start_error(AssertionError("Torch not compiled with CUDA enabled")), "the installed torch has no CUDA"),
        (
            PromptTooLongError("Shorten it.").hinted("max_context raises the limit."),
            "Shorten it. --option max_context=N raises the limit where the model allows it.",
        ),
        (EngineStartError("If you trust it, give trust_remote_code=True."), "give --option trust_remote_code=True."),
        (
            BridgeClosedError("The request was lost.").hinted("Build a new Bridge."),
            "The request was lost.",
        ),
        (PermissionError(13, "Permission denied", "./keys"), "./keys: Permission denied"),
    ],
)
def test_words_for_a_terminal(told: Exception, shown: str) -> None:
    """What the library says to a programmer would have somebody at a terminal look for a Bridge to build."""
    assert shown in in_words(told)


def test_a_deadline_in_words(scripted: Callable[..., tuple[Bridge, ScriptedEngine]]) -> None:
    """A request that passed its deadline names no function of the library, which nobody can call from a terminal."""
    bridge, _ = scripted(ScriptedEngine(step_time=3600))
    with pytest.raises(RequestTimeoutError) as raised:
        bridge.infer("hello", timeout=0.01)
    assert "deadline" in in_words(raised.value)
    assert "()" not in in_words(raised.value)


def test_completion(terminal: Open) -> None:
    """Tab completes commands, options and engines in a real bash, where argcomplete is installed, and loads nothing."""
    pytest.importorskip("argcomplete")
    folder = Path(sys.executable).parent
    if not (folder / "lmbridge").exists():
        pytest.skip("lmbridge is not installed as a command")
    with terminal(command=["/bin/bash", "--norc", "--noprofile", "-i"]) as command:
        command.send(f'PATH={folder}:$PATH; eval "$(register-python-argcomplete lmbridge)"; echo re""ady\n')
        command.read_until("ready")
        for typed, rest in (("ser", "ve "), ("demo --thr", "eads "), ("chat --engine lla", "macpp ")):
            command.send(f"lmbridge {typed}\t")
            command.read_until(f"lmbridge {typed}")
            command.read_until(rest)
            command.send("\x15")  # the line away
        command.send("exit\n")
        command.exit_status()


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
        from lmbridge.cli import model
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
        model._load(Slow(ScriptedEngine), "demo", quiet=True)
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
