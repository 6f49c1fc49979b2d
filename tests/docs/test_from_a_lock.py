"""docs/moving/from-a-lock.rst: what stands before and after there gives the same answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import Bridge
from tests.docs.test_blocks import DOCS, blocks

QUESTIONS = ["What is the capital of Peru?", "What is 37 + 48?", "Tell me a story about a fox."]
Names = dict[str, Any]


@pytest.fixture(scope="module")
def page() -> list[Names]:
    """What each block of the page has defined; the bridges are closed in the end."""
    defined = []
    for _, source in blocks(DOCS / "moving" / "from-a-lock.rst"):
        names: Names = {"__name__": "a_script"}
        exec(source, names)
        defined.append(names)
    return defined


@pytest.mark.long
def test_before_and_after_answer_alike(page: list[Names]) -> None:
    """Whoever moves from a lock, or from a queue, would get other answers than before."""
    asking = [names["ask"] for names in page if "ask" in names]
    assert len(asking) == 5
    with ThreadPoolExecutor(len(asking)) as pool:
        locked, *others = pool.map(lambda ask: [ask(question) for question in QUESTIONS], asking)
    assert others == [locked] * 4
    for names in page:
        if isinstance(names.get("bridge"), Bridge):
            names["bridge"].close()


@pytest.mark.long
def test_streams_tell_the_same(page: list[Names]) -> None:
    """A stream would tell another story than the streamer did."""
    before, after = (names for names in page if "tell" in names)
    with Bridge("demo") as bridge:
        after["bridge"] = bridge
        assert "".join(before["tell"](QUESTIONS[2])) == "".join(after["tell"](QUESTIONS[2]))


@pytest.mark.long
def test_views_answer_alike(page: list[Names]) -> None:
    """Whoever moves a Flask view from a lock would get other answers than before."""
    locked, shared = (names["app"].test_client() for names in page if "app" in names)
    for question in QUESTIONS:
        form = {"prompt": question}
        assert shared.post("/ask", data=form).json == locked.post("/ask", data=form).json
    for names in page:
        if "lm" in names:
            names["lm"].close(names["app"])
