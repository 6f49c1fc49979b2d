"""The table of docs/migrating-from-lmdeploy.rst: each cell is what LMDeploy's own Pipeline does, or what ours does."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from tests.compat.failing import EVENTS
from tests.engines.conftest import save_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migrating-from-lmdeploy.rst"
SIDES = ("lmdeploy", "lmbridge")
Cells = dict[str, dict[str, str]]  # by event, by side


def documented() -> Cells:
    """The page's table of failures: a simple table, whose cells may go on in a line that begins with a blank."""
    [body] = re.findall(r"^=+ =+ =+\nevent .*\n=+ =+ =+\n((?:.+\n)+?)=+ =+ =+\n", PAGE.read_text(), re.MULTILINE)
    [rule] = re.findall(r"^(=+ =+ =+)\nevent ", PAGE.read_text(), re.MULTILINE)
    columns = [slice(*found.span()) for found in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    for line in body.splitlines():
        cells = [line[column].strip() for column in columns]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return {row[0]: dict(zip(SIDES, row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    """Both sides go through all events, each in a process of its own: what hangs there ends with it."""
    model = save_model(tmp_path_factory.mktemp("models") / "llama")
    command = [sys.executable, "-m", "tests.compat.failing"]
    running = {
        side: subprocess.Popen([*command, side, model], cwd=ROOT, stdout=-1, stderr=-1, text=True) for side in SIDES
    }
    cells: Cells = {event: {} for event in EVENTS}
    try:
        for side, process in running.items():
            out, problems = process.communicate(timeout=100)
            assert process.returncode == 0, problems
            for event, found in map(json.loads, out.splitlines()):
                cells[event][side] = found
        yield cells
    finally:
        for process in running.values():
            process.kill()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_page_says_what_happens(observed: Cells, event: str, side: str) -> None:
    """A user who decides by the table would be told something that is not so, of LMDeploy or of the drop-in."""
    assert documented()[event][side] == observed[event][side]


def test_every_row_is_observed() -> None:
    """A row could stand in the table that nobody has seen."""
    assert set(documented()) == set(EVENTS)
