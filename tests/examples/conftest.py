"""Examples run as a user runs them: ``python examples/NAME.py``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # whether lmbridge is installed or not

RunExample = Callable[[str], str]
StartExample = Callable[..., contextlib.AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def run_example() -> RunExample:
    """Runs an example to its end and returns what it printed."""

    def run(name: str) -> str:
        done = subprocess.run(_command(name), capture_output=True, text=True, env=ENVIRONMENT, timeout=110)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.fixture
def start_example() -> StartExample:
    """Starts an example whose output is read while it runs, and ends it."""

    @contextlib.contextmanager
    def start(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*_command(name), *arguments], stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


def _command(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name)]
