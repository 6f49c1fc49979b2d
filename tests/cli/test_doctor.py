"""`lmbridge doctor`: what runs here, what is missing and how to get it, and whether a model really answers."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

import pytest

from lmbridge.engines import ENGINES

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_what_is_there_and_what_is_missing(run: Run) -> None:
    """Every engine has a line; under one whose library is missing stands the command that brings it."""
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.search(r"\d processors, .* of memory, .* free", done.stdout)
    for name in ENGINES:
        assert len([line for line in lines if line.startswith(f"{name} ")]) == 1
    assert re.search(
        r"(?m)^transformers +ready: torch \S+ \(tested: .*\), transformers \S+ \(tested: \S+\)$", done.stdout
    )
    if importlib.util.find_spec("exllamav3") is None:
        place = next(number for number, line in enumerate(lines) if line.startswith("exllamav3"))
        assert "needs exllamav3" in lines[place]
        assert lines[place + 1].strip() == 'pip install "lmbridge[exllamav3]"'


@pytest.mark.parametrize("arguments", [["--try", "--all"], ["demo", "--try", "--option", "runner=plain"]])
def test_a_model_is_tried(run: Run, arguments: list[str]) -> None:
    """With --try it says what serves the model, and shows a token of it; the list follows only if it is asked for."""
    done = run("doctor", *arguments)
    assert done.returncode == 0
    runner = "plain" if "demo" in arguments else "paged"
    assert re.search(rf"(?m)^Engine: demo on transformers.*{runner}", done.stdout)
    assert "Tasks: generate" in done.stdout
    assert re.search(r"It generated '.+' in \d+ ms", done.stdout)
    assert ("exllamav3" in done.stdout) == ("--all" in arguments)
    assert done.stdout.startswith("Loaded the model demo")


def test_a_model_that_cannot_be_loaded(run: Run) -> None:
    """The fault is named, and is not lost in a list that nobody asked for."""
    done = run("doctor", "./no-such-folder")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no-such-folder" in done.stderr
