"""The example of an engine of one's own works as a package that adds it, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmbridge import Bridge, InvalidRequestError

FOLDER = Path(__file__).parents[2] / "examples" / "own_engine"


def test_its_own_tests_pass() -> None:
    """A reader who copies the example starts from an engine that keeps the contract."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=prepend", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_it_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its pyproject.toml says makes the name known, once pip has left it in site-packages."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    info = tmp_path / "lmbridge_parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    group = project["entry-points"]["lmbridge.engines"]
    lines = ["[lmbridge.engines]", *(f"{name} = {value}" for name, value in group.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(FOLDER))
    with Bridge("loud", engine="parrot") as bridge:
        assert bridge.infer("hello there", timeout=30).text == "HELLO THERE "
    with pytest.raises(InvalidRequestError, match="voice"):
        Bridge("shy", engine="parrot")
