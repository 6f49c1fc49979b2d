"""Both pipelines through the same calls, each in a process of its own, and the tables that say what was seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "moving" / "from-lmdeploy.rst"
SIDES = ("lmdeploy", "lmbridge")
Cells = dict[str, dict[str, str]]  # by row, by side
_TITLES = ("LMDeploy 0.18", "lmbridge")


def observed(module: str, rows: Iterable[str], model: str) -> Cells:
    """What ``python -m module side model`` prints of each row; what hangs there ends with its process."""
    command = [sys.executable, "-m", module]
    running = {
        side: subprocess.Popen([*command, side, model], cwd=ROOT, stdout=-1, stderr=-1, text=True) for side in SIDES
    }
    cells: Cells = {row: {} for row in rows}
    try:
        for side, process in running.items():
            out, problems = process.communicate(timeout=100)
            assert process.returncode == 0, problems
            for row, found in map(json.loads, out.splitlines()):
                cells[row][side] = found
    finally:
        for process in running.values():
            process.kill()
    return cells


def table(head: str, cells: Cells) -> str:
    """The cells as they stand on the page, which says only once what both do."""
    rows = [(head, *_TITLES)]
    for row, found in cells.items():
        theirs, ours = (found[side] for side in SIDES)
        rows.append((row, theirs, "the same" if ours == theirs else ours))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule, ""])
