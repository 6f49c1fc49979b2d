"""The table of docs/moving/from-lmdeploy.rst: each cell is what LMDeploy's own Pipeline does, or what ours does."""

from __future__ import annotations

import importlib.util
import re

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from tests.compat.failing import EVENTS
from tests.compat.side_by_side import PAGE, SIDES, Cells
from tests.compat.side_by_side import observed as observed_cells
from tests.engines.conftest import save_model


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
def observed(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Both sides go through all events."""
    return observed_cells("tests.compat.failing", EVENTS, save_model(tmp_path_factory.mktemp("models") / "llama"))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_page_says_what_happens(observed: Cells, event: str, side: str) -> None:
    """A user who decides by the table would be told something that is not so, of LMDeploy or of the drop-in."""
    assert documented()[event][side] == observed[event][side]


def test_every_row_is_observed() -> None:
    """A row could stand in the table that nobody has seen."""
    assert set(documented()) == set(EVENTS)
