"""The table of fields in the documentation, written from what the routes and the engines serve.

Rule: text from data; nothing is asked of a server. ``python -m tests.flask.openai.fields_table`` writes it anew.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from lmbridge.engines import engine_class
from lmbridge.flask.openai.table import CHAT, COMPLETIONS, Fate, Field

PATH = Path(__file__).parents[3] / "docs" / "fields.inc"
HEADINGS = ("Field", "Route", "Values", "By", "Default, and what else there is to know")
OPENING = """\
.. written by tests/flask/openai/fields_table.py

.. list-table::
   :header-rows: 1
   :widths: 24 10 26 10 30

"""
WIDTH = 110
ENGINES = {"transformers": "transformers", "lmdeploy": "LMDeploy"}
FATES: tuple[Fate, ...] = ("served", "refused", "ignored")

_Rest = tuple[str, ...]
"""What a row says of its fields: all cells but the first."""


def written() -> str:
    """The file's text: what is served, then what is refused, then what has no effect."""
    rows = [row for fate in FATES for row in _rows(fate)]
    return OPENING + "".join([_written(row) for row in [HEADINGS, *rows]])


def _rows(fate: Fate) -> list[tuple[str, ...]]:
    """Fields of which all the same is to be said share a row."""
    names: dict[_Rest, list[str]] = {}
    for name in dict.fromkeys([*CHAT, *COMPLETIONS]):
        for rest in _rests(name, fate):
            names.setdefault(rest, []).append(f"``{name}``")
    return [(", ".join(fields), *rest) for rest, fields in names.items()]


def _rests(name: str, fate: Fate) -> list[_Rest]:
    """One for both routes, or one for each where they differ."""
    chat, completions = [_rest(table[name]) if name in table else None for table in (CHAT, COMPLETIONS)]
    if chat == completions and chat is not None:
        return [("both", *chat)] if CHAT[name].fate == fate else []
    found = []
    for route, table, rest in (("chat", CHAT, chat), ("completions", COMPLETIONS, completions)):
        if rest is not None and table[name].fate == fate:
            found.append((route, *rest))
    return found


def _rest(field: Field) -> _Rest:
    by = {"served": _by(field), "refused": "refused", "ignored": "no effect"}[field.fate]
    return field.kind.expected, by, field.note


def _by(field: Field) -> str:
    """Who serves it: the server itself, whatever the engine, or the engines that can."""
    if field.option is None:
        return "the server"
    able = [shown for name, shown in ENGINES.items() if field.option in engine_class(name).supports]
    return "any engine" if len(able) == len(ENGINES) else ", ".join(able)


def _written(row: tuple[str, ...]) -> str:
    """A row of a list-table, with long cells in several lines."""
    cells = ["\n       ".join(textwrap.wrap(cell, WIDTH)) for cell in row]
    return "".join([f"{line.rstrip()}\n" for line in ("   * - " + "\n     - ".join(cells)).split("\n")])


if __name__ == "__main__":
    PATH.write_text(written())
