"""The code of docs/moving/from-lmdeploy.rst runs as it stands there, with the bundled model for a large one."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import pytest

from lmbridge.compat.lmdeploy import Pipeline, install

PAGE = Path(__file__).parents[2] / "docs" / "moving" / "from-lmdeploy.rst"
BLOCK = re.compile(r"\.\. code-block:: python3?\n(?:   :.*\n)*\n((?:(?:   .*)?\n)+)")
QUESTION = "What is 2 + 2?"
Names = dict[str, Any]


def no_more(names: Names) -> str:
    return ""


def by_flask(names: Names) -> str:
    client = names["app"].test_client()
    asked = [client.post("/ask", json={"question": question}) for question in (QUESTION, "")]
    assert asked[1].status_code == 400
    return str(asked[0].text + client.post("/stream", json={"question": QUESTION}).text)


def by_gradio(names: Names) -> str:
    return str(list(names["page"](QUESTION, []))[-1])


USES: list[tuple[str, Callable[[Names], str], list[str]]] = [
    ("one word", no_more, ["0 ", "1 "]),
    ("install", no_more, ["= 4."]),
    ("queues after", no_more, ["= 4.", "= 6."]),
    ("lock before", no_more, ["= 4."]),
    ("lock after", no_more, ["= 4."]),
    ("pool", no_more, ["= 4.", "= 6.", "= 8."]),
    ("Flask", by_flask, ['"answer":"2 + 2 = 4."', "\n2 + 2 = 4."]),
    ("Gradio", by_gradio, ["2 + 2 = 4."]),
    ("notebook", no_more, ["= 4.", "['3 + 3 = 6.', '4 + 4 = 8.']"]),
]
"""What each block is for, what its user does next, and what is said then."""


def blocks() -> list[str]:
    return [textwrap.dedent(source) for source in BLOCK.findall(PAGE.read_text())]


def execute(source: str, names: Names) -> None:
    """As a cell of a notebook: an ``await`` outside of functions runs on a loop that runs already."""
    code: CodeType = compile(source, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(FunctionType(code, names)())
    else:
        exec(code, names)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """The globals of a block. Gradio is a stand-in that gives the callback back: a page is no matter here."""
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(ChatInterface=lambda reply, **options: reply))
    found: Names = {"__name__": "a_script"}
    with install(backend="transformers", model="demo"):
        yield found
    for value in found.values():
        if isinstance(value, Pipeline):
            value.close()


@pytest.mark.parametrize(
    ("number", "use", "words"), [(i, *use[1:]) for i, use in enumerate(USES)], ids=next(zip(*USES, strict=True))
)
def test_code_of_the_page(
    names: Names, number: int, use: Callable[[Names], str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever copies it, before or after, gets answers."""
    execute(blocks()[number], names)
    said = capsys.readouterr().out + use(names)
    assert [word for word in words if word not in said] == []


def test_every_block_is_run() -> None:
    """A block could stand on the page that nobody has run."""
    assert len(blocks()) == len(USES)
