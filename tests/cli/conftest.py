"""Commands run as a user runs them: in a process of their own, with pipes or in a terminal."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LMBRIDGE = [sys.executable, "-m", "lmbridge"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # whether lmbridge is installed or not
PATIENCE = 90.0  # seconds for anything a command is waited for

# Opening its terminal makes it the controlling one of a new session, so that ^C becomes a signal; and a shell
# that runs the tests in its background has them ignore that signal.
_TAKE_TERMINAL = """
import os, signal, sys
os.open(os.ttyname(0), os.O_RDWR)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Open = Callable[..., contextlib.AbstractContextManager["Terminal"]]


class Terminal:
    """A command in a terminal of 80 columns and 24 rows: typed into, and read until it says something."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._master = master
        self._seen = 0  # how far into ``text`` read_until has come

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, text: str) -> None:
        """Read on until ``text`` is shown."""
        assert self._shows(text, PATIENCE), f"no {text!r} in:\n…{self.shown[-2000:]}"

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at a prompt until ``text`` is shown.

        Python's readline misses a signal that arrives just before it waits for a key, until the next one.
        """
        self.send("\x03")
        while not self._shows(text, 2.0):
            self.send("\x03")
            assert self.process.poll() is None

    def exit_status(self) -> int:
        """Read to the end of the command and return its status."""
        deadline, going_on = time.monotonic() + PATIENCE, True
        while going_on:
            going_on = self._receive(deadline - time.monotonic())
        return self.process.wait(timeout=max(1.0, deadline - time.monotonic()))

    @property
    def text(self) -> str:
        """All that was shown, without colours and cursor movements."""
        return _ESCAPES.sub("", self.raw)

    @property
    def shown(self) -> str:
        """``text`` with every run of blanks and line ends as one blank."""
        return " ".join(self.text.split())

    def _shows(self, text: str, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while (start := self.text.find(text, self._seen)) < 0:
            if not self._receive(deadline - time.monotonic()):
                return False
        self._seen = start + len(text)
        return True

    def _receive(self, patience: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, patience))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += self._decoder.decode(data)
        return bool(data)


@contextlib.contextmanager
def _open(*arguments: str, command: list[str] = LMBRIDGE) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *command, *arguments],
        stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.fixture
def terminal() -> Open:
    """Opens ``lmbridge ARGUMENTS``, or another command, in a terminal."""
    return _open


@pytest.fixture
def run() -> Run:
    """Runs ``lmbridge ARGUMENTS``, or another command, with pipes to its end."""

    def run(*arguments: str, stdin: str = "", command: list[str] = LMBRIDGE) -> Done:
        return subprocess.run(
            [*command, *arguments],
            input=stdin, capture_output=True, encoding="utf-8", cwd=ROOT, env=ENVIRONMENT, timeout=PATIENCE,
        )  # fmt: skip

    return run


@pytest.fixture
def scripted_command() -> list[str]:
    """The command that runs ``scripted.py``: a command's inside on a scripted engine."""
    path = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); "
    run = f"runpy.run_path({str(Path(__file__).parent / 'scripted.py')!r}, run_name='__main__')"
    return [sys.executable, "-c", path + run]
