"""Recipes run as their users run them: each in a process of its own, under the framework's own server or worker.

Rule: a framework that is not installed skips its tests with the line that installs it; the one for all of them is
``pip install django celery fastapi uvicorn gradio streamlit nbclient ipykernel gunicorn``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "examples" / "recipes"
PATIENCE = 60.0  # seconds for a framework to start or to end


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skips where one of the modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    line = f"pip install {' '.join(missing)}; python -m pytest tests/examples/recipes -m 'long or not long'"
    return pytest.mark.skipif(bool(missing), reason=line)


class Served:
    """A recipe that runs: what it has printed so far, and its end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._over = False  # guarded by _more, as are the lines
        self._reader = threading.Thread(target=self._read, name="output of a recipe")
        self._reader.start()

    def until(self, word: str, times: int = 1) -> None:
        """Return once a word has been printed so many times."""
        with self._more:
            self._more.wait_for(lambda: self._over or self._seen(word) >= times, PATIENCE)
            assert self._seen(word) >= times, self.output

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def stop(self, with_signal: int = signal.SIGINT) -> int:
        """Ask it to end, as Ctrl-C does, and give its exit status."""
        self.process.send_signal(with_signal)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(PATIENCE)

    def _seen(self, word: str) -> int:
        return sum(word in line for line in self._lines)

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout:
            for line in self.process.stdout:
                with self._more:
                    self._lines.append(line)
                    self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs ``python -m`` what is given in a process group of its own, and ends it."""
    running: list[Served] = []

    def start(*command: str, env: Mapping[str, str] = {}, cwd: Path = RECIPES) -> Served:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(Served(process))
        return running[-1]

    yield start
    for served in running:
        served.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(port: int, path: str, prompt: str) -> tuple[int, str]:
    """Status and text of what a recipe answers."""
    query = urllib.parse.urlencode({"prompt": prompt})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}?{query}", timeout=PATIENCE) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()
