"""Scripted answers behind a real server, and what goes over the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai import OpenAI

from lmbridge import Bridge
from lmbridge.messages import Delta, Request, ToolCall
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, Served, build_app, serving

Pieces = list[str | Delta]

ANSWERS: dict[str, Pieces] = {
    "Hello": ["Good", " day"],
    "Think": [Delta(reasoning="Let me"), Delta(reasoning=" see."), "It is", " so."],
    "Weather?": [
        Delta(reasoning="I must look."),
        Delta(tool_calls=[ToolCall(0, "call_a", "weather", "")]),
        Delta(tool_calls=[ToolCall(0, arguments='{"city": ')]),
        Delta(tool_calls=[ToolCall(0, arguments='"Rome"}')]),
        Delta(tool_calls=[ToolCall(1, "call_b", "weather", '{"city": "Oslo"}')]),
    ],
    "How is it?": [Delta(tool_calls=[ToolCall(0, "call_a", "weather", '{"city": "Rome"}')])],
    "Both": ["Wait.", Delta(tool_calls=[ToolCall(0, "call_a", "weather", '{"city": "Rome"}')])],
    "Make somebody up.": ['{"name": "Ann", "age": 7}'],
    "Person": ['{"name": "Ann",', ' "age": 7}'],
    "Nothing": [""],
    "Only thoughts": [Delta(reasoning="Hm.")],
    "Likely": [
        Delta(reasoning="Hm.", logprobs=[{3: -0.5}]),
        Delta("Yes", logprobs=[{1000: -0.25, 7: -2.0}]),
        Delta(" no", logprobs=[{7: -1.5}]),
    ],
}


def nobody_knows(item_id: str) -> None:
    """What is said of an item that is referred to."""


class Script:
    """Answers by the last message, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Pieces:
        self.requests.append(request)
        said = self.last.prompt[-1]
        assert isinstance(said, dict)
        return ANSWERS.get(str(said["content"]), ["Well."])

    @property
    def last(self) -> Request:
        return self.requests[-1]


class Api:
    """A server with a scripted engine, asked by the official client and without one."""

    def __init__(self, served: Served, script: Script) -> None:
        self.served = served
        self.script = script

    def post(self, **fields: Any) -> Any:
        """The JSON of an answer, or of an error."""
        return requests.post(f"{self.served.url}/responses", json=fields, timeout=PATIENCE).json()

    def events(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, each of the type that its line says."""
        url, found = f"{self.served.url}/responses", []
        response = requests.post(url, json={**fields, "stream": True}, timeout=PATIENCE)
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for block in response.text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if lines:
                kind, data = lines
                found.append(json.loads(data.removeprefix("data: ")))
                assert kind == f"event: {found[-1]['type']}"
        return found


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    script = Script()
    engine = ScriptedEngine(script)
    with Bridge(engine) as bridge, serving(build_app({"scripted": bridge})) as address:
        yield Api(Served(f"{address}/v1", bridge, engine), script)


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[OpenAI]:
    with api.served.client() as client:
        yield client
