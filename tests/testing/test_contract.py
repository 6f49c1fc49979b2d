"""The engine contract on the scripted engine and on one in the form of an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lmbridge import Bridge, Delta, Engine, EngineError, Request
from lmbridge.testing import EngineContract, ScriptedEngine, prompt_text

PROMPTS = [f"prompt number {number} of several" for number in range(6)]
LONG = "word " * 300


class IteratorEngine(Engine):
    """An engine whose author wrote ``generate`` only; some prompts make it misbehave."""

    name = "iterator"
    max_batch_size = 4

    async def start(self) -> None:
        pass

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        text = prompt_text(request.prompt)
        if text == "raise at once":
            raise ValueError("at once")
        for word in text.split(" "):
            yield Delta(word + " ", [len(word)])
            await asyncio.sleep(0.001)
        if text == "raise later":
            raise ValueError("later")
        if text == "exit":
            raise SystemExit(1)
        if text != "end without a word":
            yield Delta(finish_reason="stop")


class TestScriptedEngine(EngineContract):
    """The scripted engine keeps the contract."""

    prompts = PROMPTS
    long_prompt = LONG
    stall_timeout = 1.0

    def engine(self) -> Engine:
        return ScriptedEngine(step_time=0.001, max_batch_size=4)


class TestIteratorEngine(EngineContract):
    """So does an engine that only yields."""

    prompts = PROMPTS
    long_prompt = LONG
    stall_timeout = 1.0

    def engine(self) -> Engine:
        return IteratorEngine()


@pytest.mark.parametrize(
    ("prompt", "partial"),
    [
        ("raise at once", ""),
        ("raise later", "raise later "),
        ("exit", "exit "),
        ("end without a word", "end without a word "),
    ],
)
def test_an_iterator_that_misbehaves(prompt: str, partial: str) -> None:
    """Wherever an iterator fails, its own caller gets an EngineError with the text so far; the next call is served."""
    with Bridge(IteratorEngine) as bridge:
        with pytest.raises(EngineError) as caught:
            bridge.infer(prompt, timeout=10)
        assert caught.value.partial == partial
        assert bridge.infer("good words", timeout=10).text == "good words "
