"""The channel's queues: what of janus they lean on, and what is said of a janus that has changed."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmbridge.crossing import channel

LATER = """
import janus

class Later(janus.Queue):
    def __init__(self):
        super().__init__()
        {change}

janus.Queue, janus.__version__ = Later, "9.9"
"""
DOCTORED = {
    "a lock renamed": (
        LATER.format(change="self._getters = self.__dict__.pop('_sync_not_empty')"),
        ["janus 9.9", "Queue._getters is new", "Queue._sync_not_empty is gone"],
    ),
    "one lock more": (
        LATER.format(change="import threading; self._sync_turn = threading.RLock()"),
        ["janus 9.9", "Queue._sync_turn is new"],
    ),
    "no locks at all": (
        LATER.format(change="self.__dict__.clear()"),
        ["janus 9.9", *(f"Queue.{name} is gone" for name in channel.LOCKS)],
    ),
    "a queue that needs a loop": (
        LATER.format(change="import asyncio; asyncio.get_running_loop()"),
        ["janus 9.9", "RuntimeError: no running event loop"],
    ),
    "one without shutdown": ("import janus; del janus.SyncQueueShutDown", ["janus 2", "SyncQueueShutDown"]),
}


@pytest.mark.parametrize("changed", DOCTORED)
def test_a_janus_that_has_changed_is_refused_by_name(changed: str) -> None:
    """An upgrade of janus would otherwise bring queues that lock up, now and then, under somebody's Ctrl-C."""
    doctor, names = DOCTORED[changed]
    script = f"{doctor}\ntry:\n    from lmbridge import Bridge\nexcept ImportError as error:\n    print(repr(error))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("MissingDependencyError(")
    assert [name for name in names if name not in done.stdout] == []
    assert f"tested version {channel.TRIED}" in done.stdout


def test_the_pip_line_of_a_changed_janus_is_what_setup_cfg_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows the advice would otherwise get a janus that is refused again."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    bounds = next(line for line in config["options"]["install_requires"].splitlines() if line.startswith("janus"))
    monkeypatch.setattr(channel, "LOCKS", ())
    with pytest.raises(ImportError) as caught:
        channel._check_janus()
    assert f"pip install '{bounds.replace(' ', '')}'" in str(caught.value)


def test_every_lock_of_a_queue_is_the_one_that_is_safe_to_interrupt() -> None:
    """One lock of janus' own left in a queue could be held for good after a Ctrl-C."""
    queue: Any = channel.Channel[Any]().replies
    assert {type(getattr(queue, name)) for name in channel.LOCKS} == {channel._Condition}
    assert len({id(getattr(queue, name)) for name in channel.LOCKS}) == 1
