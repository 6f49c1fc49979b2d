"""The example of an app and its tests: they pass as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "testing"


def test_its_own_tests_pass() -> None:
    """A reader who copies the example starts from tests that pass, without a model and within seconds."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=prepend", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
