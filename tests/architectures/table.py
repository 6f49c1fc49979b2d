"""The table of architectures in the documentation, made from the rows that the tests check one by one.

Rule: text from data; no model is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from tests.architectures.models import ARCHITECTURES, REFUSED, configuration

PATH = Path(__file__).parents[2] / "docs" / "architectures.inc"
HEADINGS = ("Class", "What is special", "Runner")


def written() -> str:
    """The file's text: how many run how, and a table by class."""
    rows = sorted(_served() + _refused(), key=lambda row: (row[0].lower(), row[1]))
    widths = [max(len(cell) for cell in column) for column in zip(HEADINGS, *rows, strict=True)]
    rule = " ".join("=" * width for width in widths)
    lines = [rule, _line(HEADINGS, widths), rule, *(_line(row, widths) for row in rows), rule]
    return "\n".join([".. written by the tests in tests/architectures", "", _summary(), "", *lines, ""])


def _summary() -> str:
    paged = sum(architecture.runner == "paged" for architecture in ARCHITECTURES)
    served = len(ARCHITECTURES)
    return f"{paged} of these models run ``paged`` and {served - paged} ``plain``; {len(REFUSED)} are refused."


def _served() -> list[tuple[str, ...]]:
    return [(_class(row.kind, row.settings), row.about, f"``{row.runner}``") for row in ARCHITECTURES]


def _refused() -> list[tuple[str, ...]]:
    return [(row.model, "", f"refused: {row.why}") for row in REFUSED]


def _class(kind: str, settings: Mapping[str, Any]) -> str:
    """The name in the ``architectures`` of a model's config.json."""
    name: str = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(configuration(kind, settings))].__name__
    return name


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return " ".join(padded).rstrip()
