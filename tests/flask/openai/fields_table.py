"""The tables of fields in the documentation, written from what the routes and the engines serve.

Rule: text from data; nothing is asked of a server. ``python -m tests.flask.openai.fields_table`` writes them anew.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from lmbridge.engines import engine_class
from lmbridge.flask.openai.responses.table import RESPONSES
from lmbridge.flask.openai.table import CHAT, COMPLETIONS, Fate, Field

PATH = Path(__file__).parents[3] / "docs" / "http" / "fields.inc"
RESPONSES_PATH = PATH.with_name("responses_fields.inc")
HEADINGS = ("Field", "Route", "Values", "By", "Default, and what else there is to know")
OPENING = """\
.. written by tests/flask/openai/fields_table.py

.. list-table::
   :header-rows: 1
   :widths: 24 10 26 10 30

"""
RESPONSES_OPENING = OPENING.replace("24 10 26", "26 34")
WIDTH = 110
ENGINES = {"transformers": "transformers", "lmdeploy": "LMDeploy"}
FATES: tuple[Fate, ...] = ("served", "refused", "ignored")

_Rest = tuple[str, ...]
"""What a row says of its fields: all cells but the first."""


def written() -> str:
    """The file's text: what is served, then what is refused, then what has no effect."""
    rows = [row for fate in FATES for row in _rows(fate)]
    return OPENING + "".join([_written(row) for row in [HEADINGS, *rows]])


def written_responses() -> str:
    """The same of the route that has a table of its own."""
    headings = (HEADINGS[0], *HEADINGS[2:])
    rows = [
        row
        for fate in FATES
        for row in _sharing((name, _rest(field)) for name, field in RESPONSES.items() if field.fate == fate)
    ]
    return RESPONSES_OPENING + "".join([_written(row) for row in [headings, *rows]])


def _rows(fate: Fate) -> list[tuple[str, ...]]:
    return _sharing((name, rest) for name in dict.fromkeys([*CHAT, *COMPLETIONS]) for rest in _rests(name, fate))


def _sharing(fields: Iterable[tuple[str, _Rest]]) -> list[tuple[str, ...]]:
    """Fields of which all the same is to be said share a row."""
    names: dict[_Rest, list[str]] = {}
    for name, rest in fields:
        names.setdefault(rest, []).append(f"``{name}``")
    return [(", ".join(shared), *rest) for rest, shared in names.items()]


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
    RESPONSES_PATH.write_text(written_responses())
