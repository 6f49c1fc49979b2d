"""Where a thread stands is told without holding up the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

from lmbridge.engines.standing import where_is


def test_a_thread_that_waits() -> None:
    """The message of a stall names the innermost places, and says nothing of a thread that has ended."""
    release, stands = threading.Event(), threading.Event()

    def hang() -> None:
        stands.set()
        release.wait(60)

    thread = threading.Thread(target=hang)
    thread.start()
    assert stands.wait(60)
    assert "engines/test_standing.py:" in where_is(thread.ident, depth=4)
    release.set()
    thread.join()
    assert where_is(thread.ident) == where_is(None) == ""


def test_looking_does_not_stop_the_process() -> None:
    """A collection in the midst of the look, with something of a thread's own in it, stopped all threads for ever."""
    source = """
        import gc, threading
        from lmbridge.engines.standing import where_is

        class Garbage:
            def __init__(self):
                self.me, self.own = self, threading.local()

        def deep(frames):
            release.wait(60) if frames == 0 else deep(frames - 1)

        gc.set_threshold(5)
        release = threading.Event()
        threads = [threading.Thread(target=deep, args=(50,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for _ in range(20_000):
            where_is(threads[0].ident)
            Garbage()
        release.set()
        print(gc.isenabled())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True\n"
