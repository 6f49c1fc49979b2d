"""Ray as a program starts it and ends with it; each in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip('needs Ray Serve: pip install "lmbridge[ray]"', allow_module_level=True)

pytestmark = pytest.mark.timeout(240)

TWO_IN_TURN = """
import psutil, ray
from lmbridge import Bridge
from lmbridge.engines.ray import RayEngine
from lmbridge.testing import ScriptedEngine

def engine():
    return RayEngine("echo", inner_engine=lambda model: ScriptedEngine(), num_cpus=0.5)

with Bridge(engine) as one:
    with Bridge(engine) as other:
        assert other.infer("say this").text == "say this"
    assert one.infer("and this").text == "and this", "the other took Ray with it"
assert not ray.is_initialized(), "Ray is left behind"
left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)[1]
assert not left, f"processes are left behind: {left}"
with Bridge(engine) as again:
    assert again.infer("once more").text == "once more"
print("through")
"""

LEFT_OPEN = """
from lmbridge import Bridge
from lmbridge.engines.ray import RayEngine
from lmbridge.testing import ScriptedEngine

def slow(model):
    return ScriptedEngine(step_time=0.05)

bridge = Bridge(lambda: RayEngine("echo", inner_engine=slow, num_cpus=0.5)).start()
stream = bridge.stream("word " * 2000)
next(stream)
print("through", flush=True)
"""


@pytest.mark.parametrize("program", [TWO_IN_TURN, LEFT_OPEN], ids=["two_in_turn", "left_open"])
def test_a_program_ends_and_leaves_nothing(program: str) -> None:
    """A Ray that outlives its program holds memory, ports and GPUs; one that goes too early takes answers with it."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "through" in ended.stdout
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
