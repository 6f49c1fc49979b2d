"""The beginning and end of vLLM's processes, and what ends requests early."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

if importlib.util.find_spec("vllm") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs vLLM; tests/engines/vllm/run.sh installs its build for CPUs", allow_module_level=True)

from lmbridge import Bridge, EngineDeadError, GenerationConfig
from lmbridge.engines.vllm import VLLMEngine
from lmbridge.errors import EngineStartError
from tests.conftest import until
from tests.engines.vllm.conftest import QUIET, small

pytestmark = QUIET
LONG = GenerationConfig(ignore_eos=True, max_new_tokens=900)


def processes(name: str = "") -> list[psutil.Process]:
    """Those under this one whose name has ``name``; Python's own keeper of shared memory stays and is left out."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in "".join(process.cmdline()) and name in process.name():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def served() -> Iterator[tuple[Bridge, list[VLLMEngine]]]:
    engines: list[VLLMEngine] = []

    def build() -> VLLMEngine:
        engines.append(small())
        return engines[-1]

    with Bridge(build) as bridge:
        yield bridge, engines


def test_closing_leaves_nothing(served: tuple[Bridge, list[VLLMEngine]]) -> None:
    """Each bridge closed would leave a model in memory, a thread or a socket."""
    bridge, _ = served
    stream = bridge.stream("Hello!", LONG)
    next(stream)
    assert processes()
    bridge.close()
    assert processes() == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "MPClientEngineMonitor"] == []
    assert psutil.Process().net_connections() == []


@pytest.mark.parametrize("victim", ["EngineCor", "Worker"])
def test_a_killed_process_is_told_at_once(served: tuple[Bridge, list[VLLMEngine]], victim: str) -> None:
    """Callers would wait for an engine whose process is gone, killed for memory say, until the stall is noticed."""
    bridge, engines = served
    stream = bridge.stream("Hello!", LONG, timeout=120)
    next(stream)
    (killed,) = processes(victim)
    os.kill(killed.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EngineDeadError) as dead:
        for _ in stream:
            pass
    assert time.monotonic() - start < 5
    assert dead.value.retryable
    assert bridge.infer("Hello!", timeout=120).text
    assert len(engines) == 2


def test_what_is_aborted_is_gone_from_vllm(served: tuple[Bridge, list[VLLMEngine]]) -> None:
    """Answers that nobody waits for would take places in vLLM's batch, whenever they were given up."""
    bridge, engines = served
    bridge.infer("Hello!", timeout=120)
    core = engines[0]._core
    for _ in range(20):
        bridge.submit("Hello!", LONG).cancel()
    streams = [bridge.stream("Hello!", LONG) for _ in range(4)]
    for stream in streams:
        next(stream)
        stream.close()
    stopped = bridge.infer("Tell me a story about a fox.", stop_words=["a"], ignore_eos=True)
    assert stopped.finish_reason == "stop"
    until(lambda: core.get_num_unfinished_requests() == 0)
    assert bridge.stats()["in_flight"] == 0


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """vLLM's processes import the user's script, which would build its engine in there again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from lmbridge import Bridge
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
        with Bridge("demo", engine="vllm", dtype="float32", engine_args=options) as bridge:
            print(bridge.infer("What is the capital of France?", timeout=120).text)
    """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Paris" in done.stdout
    assert done.stdout.count("\n") == 1, "vLLM speaks where answers are"


def test_what_cannot_be_loaded_is_an_error() -> None:
    """A mistyped engine argument, or one that vLLM cannot follow, would look like a model that loads forever."""
    for options, why in (
        ({"engine_args": {"quantisation": "awq"}}, "no engine argument 'quantisation'"),
        ({"max_context": 10**6}, "max_model_len"),
    ):
        with pytest.raises(EngineStartError, match=why), Bridge(functools.partial(small, **options)) as bridge:
            bridge.infer("Hello!", timeout=120)
    assert processes() == []
