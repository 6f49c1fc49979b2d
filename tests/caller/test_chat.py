"""A conversation: its history, and one turn at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge import Bridge, EngineError, InvalidRequestError
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_a_second_turn_meanwhile_is_refused(scripted: Scripted) -> None:
    """Two threads in one conversation would each get an answer, and one turn would be missing from the history."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    chat = bridge.chat()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat.ask, "first", timeout=30)
        engine.wait_for(lambda e: e.active == 1)
        with pytest.raises(InvalidRequestError, match="in the middle of a turn"):
            chat.ask("second")
        with pytest.raises(InvalidRequestError, match="in the middle of a turn"):
            chat.stream("second")
        engine.step()
        assert first.result(30).text == "first"
    assert [message["content"] for message in chat.messages] == ["first", "first"]


def test_a_turn_that_was_left_is_over(scripted: Scripted) -> None:
    """However a turn ends, the next one may begin: it failed, its stream was closed, or nobody ever read it."""
    bridge, engine = scripted()
    chat = bridge.chat()
    for ask in (chat.ask, lambda text: list(chat.stream(text))):
        engine.refuse("poison", EngineError("no"))
        with pytest.raises(EngineError) as kept:
            ask("poison")
    chat.stream("never read")
    closed = chat.stream("closed in the middle")
    next(closed)
    closed.close()
    assert chat.ask("at last", timeout=30).text == "at last"
    assert [message["content"] for message in chat.messages] == ["at last", "at last"]
    del kept
