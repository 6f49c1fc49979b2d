"""The example of an app and its tests: they pass as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("folder", "tests"), [("examples/testing", "."), (".", "examples/testing")])
def test_its_own_tests_pass(folder: str, tests: str) -> None:
    """A reader who runs the example's tests, in its folder or at the top, would not see them pass within seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
