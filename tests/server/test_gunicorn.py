"""A bridge under a real gunicorn, whose workers are forked."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

APP = """
    from lmbridge import Bridge, ForkedError
    from lmbridge.testing import ScriptedEngine

    bridge = Bridge(ScriptedEngine)
    if {started}:
        bridge.start()

    def app(environ, start_response):
        try:
            status, text = "200 OK", bridge.infer("hello " + environ["QUERY_STRING"], timeout=30).text
        except ForkedError as error:
            status, text = "503 Service Unavailable", str(error)
        start_response(status, [("Content-Type", "text/plain")])
        return [text.encode()]
"""


@contextmanager
def gunicorn(folder: Path, started: bool, *options: str) -> Iterator[str]:
    """The address of a gunicorn with one worker of 16 threads."""
    (folder / "served.py").write_text(textwrap.dedent(APP.format(started=started)))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", "-w", "1", "-k", "gthread", "--threads", "16"]
    command += ["--pythonpath", f"{folder},{root}", *options, "served:app"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"Listening at: (http://\S+)", line)
            if found:
                yield found[1]
                break
        else:
            pytest.fail("gunicorn did not start")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_a_bridge_built_at_import_starts_in_the_worker(tmp_path: Path, options: tuple[str, ...]) -> None:
    """With and without --preload, a bridge that has not started serves in the worker, many threads at once."""
    with gunicorn(tmp_path, False, *options) as address, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: get(f"{address}/?{number}"), range(64)))
    assert answers == [(200, f"hello {number}") for number in range(64)]


def test_a_bridge_started_before_the_fork_says_so(tmp_path: Path) -> None:
    """With --preload, a bridge started at import is in the wrong process: each view is told at once, none hangs."""
    with gunicorn(tmp_path, True, "--preload") as address:
        status, text = get(address)
    assert status == 503
    assert "without --preload" in text


def test_a_bridge_started_at_import_without_preload(tmp_path: Path) -> None:
    """Without --preload the module is imported in the worker, so starting there is fine."""
    with gunicorn(tmp_path, True) as address:
        assert get(f"{address}/?there")[1] == "hello there"
