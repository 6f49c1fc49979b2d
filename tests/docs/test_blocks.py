"""Every page's Python runs as it stands there: a page's blocks, one after another, are one script."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)\.\. code-block:: python\n((?:\1   :.*\n)*)\n((?:(?:\1   .*)?\n)+)", re.MULTILINE)
NEEDS = re.compile(r":class: needs-")  # a hub, a GPU, a server: such a block is only compiled


def blocks(page: Path) -> list[tuple[str, str]]:
    """(options, source) of each Python block."""
    return [(options, textwrap.dedent(source)) for _, options, source in BLOCK.findall(page.read_text())]


PAGES = sorted(page for page in DOCS.rglob("*.rst") if blocks(page))


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_page_runs(page: Path, tmp_path: Path) -> None:
    """Whoever copies a page from its top on gets no error."""
    source = "\n".join(source for options, source in blocks(page) if not NEEDS.search(options))
    script = tmp_path / "page.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=None, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_page_compiles(page: Path) -> None:
    """What needs a hub, a GPU or a server of its own is Python all the same."""
    for options, source in blocks(page):
        compile(source, f"{page}{' ' + options.strip() if options else ''}", "exec")
