"""The cells of the page's notebook, run by a kernel of Jupyter's."""

from __future__ import annotations

import re
import textwrap

import pytest

from tests.examples.recipes.conftest import ROOT, needs

PAGE = ROOT / "docs" / "moving" / "recipes.rst"
CELL = re.compile(r"\.\. code-block:: python3\n\n((?:(?:   .*)?\n)+)")


@needs("nbclient", "ipykernel")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_cells_run() -> None:
    """In a notebook, whose loop runs already, the calls would raise or block for ever."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    cells = [textwrap.dedent(source) for source in CELL.findall(PAGE.read_text())]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(book, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert "Paris" in said[0]
    assert "fox" in said[1]
    assert "['3 + 3 = 6.', '4 + 4 = 8.']" in said[2]
