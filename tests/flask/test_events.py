"""The events of ``stream_response`` where an answer is more than text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from lmbridge import Delta
from lmbridge.flask.models import models_of
from lmbridge.flask.testing import scripted_engine
from lmbridge.messages import ToolCall
from tests.flask.test_extension import create_app, events

SAID = [
    Delta(reasoning="A look is best."),
    Delta("I look."),
    Delta(tool_calls=[ToolCall(0, "a", "look", '{"at":')]),
    Delta(tool_calls=[ToolCall(0, arguments=' "it"}')]),
]


@pytest.fixture
def app() -> Iterator[Flask]:
    app = create_app()
    yield app
    models_of(app).close()


def test_reasoning_and_calls_are_events_of_their_own(app: Flask) -> None:
    """A page that shows texts alone shows none of what the model thinks or calls; one that looks finds it all."""
    with scripted_engine(app, script=lambda request: SAID):
        *said, end = events(app.test_client().post("/tell", json={"prompt": "Look!"}))
    assert "".join(event.get("reasoning", "") for event in said) == "A look is best."
    assert "".join(event.get("text", "") for event in said) == "I look."
    first, *rest = [piece for event in said for piece in event.get("tool_calls", ())]
    assert {**first, "arguments": ""} == {"index": 0, "id": "a", "name": "look", "arguments": ""}
    assert "".join(piece["arguments"] for piece in [first, *rest]) == '{"at": "it"}'
    assert end["finish_reason"] == "tool_calls"
