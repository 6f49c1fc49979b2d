"""Apps in processes of their own, under the servers that people use; what they print is read as it comes."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

PATIENCE = 60.0  # seconds after which a test is taken to hang


class Process:
    """A running program, and the lines that it prints.

    Attributes:
        lines: those that were read so far.
    """

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that matches from here on."""
        with contextlib.suppress(queue.Empty):
            while (line := self._queue.get(timeout=PATIENCE)) is not None:
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(f"{pattern!r} was never printed:\n{self.printed}")

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; its exit status. All it has printed is in ``lines`` then.

        Ctrl-C strikes its children too, as in a terminal.
        """
        (os.killpg if number == signal.SIGINT else os.kill)(self.popen.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its own end."""
        try:
            status = self.popen.wait(PATIENCE)
        finally:
            self.popen.kill()
            self._reader.join(PATIENCE)
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._queue.put(line)
        self._queue.put(None)


@contextmanager
def running(folder: Path, source: str, *command: str) -> Iterator[Process]:
    """``python -m command`` beside a module ``served`` with this source, which ends with the ``with`` at the latest."""
    (folder / "served.py").write_text(textwrap.dedent(source))
    environ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as popen:  # fmt: skip
        process = Process(popen)
        try:
            yield process
        finally:
            if popen.poll() is None:
                process.end()


@contextmanager
def on_gunicorn(folder: Path, source: str, *options: str) -> Iterator[tuple[Process, str]]:
    """The app of a module under gunicorn with one worker of threads, unless ``options`` say otherwise; and its URL."""
    command = ["gunicorn", "-b", "127.0.0.1:0", "--no-control-socket", "-k", "gthread", "--threads", "8", *options]
    with running(folder, source, *command, "served:app") as process:
        yield process, process.wait_for(r"Listening at: (http://\S+)")[1]


def get(url: str) -> tuple[int, str, Message]:
    """What a GET is answered with, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers
