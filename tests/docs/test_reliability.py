"""The table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_named_is_there() -> None:
    """A reader can find and run what the table of faults promises."""
    named = set(re.findall(r"``((?:test|Test)\w+)``", (ROOT / "docs" / "reliability.rst").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in named if not re.search(rf"\b(def {name}\(|{name} = )", sources)]
    assert len(named) > 50
    assert missing == []
