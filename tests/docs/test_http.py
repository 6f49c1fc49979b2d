"""docs/http/index.rst shows code that runs, and every key there is."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lmbridge.flask.config import KEYS

PAGE = (Path(__file__).parents[2] / "docs" / "http" / "index.rst").read_text()
BLOCKS = [textwrap.dedent(source) for source in re.findall(r"\.\. code-block:: python\n\n((?:(?:   .*)?\n)+)", PAGE)]


def run(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_the_app_answers_and_its_test_passes() -> None:
    """The factory answers through the bundled model, and the page's own test of it passes."""
    asked = 'print(create_app().test_client().post("/ask", json={"prompt": "What is the capital of Kenya?"}).json)'
    assert "Nairobi" in run("\n".join([BLOCKS[0], BLOCKS[1], "test_ask()", asked]))


def test_every_key_is_in_the_table() -> None:
    """Whoever looks for a setting looks here."""
    shown = set(re.findall(r"\* - ``(LMBRIDGE_\w+)``", PAGE))
    assert shown == set(KEYS)
