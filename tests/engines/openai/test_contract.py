"""The engine contracts over a real server of lmbridge's own, whose engine is scripted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmbridge import Engine
from lmbridge.engines.openai import OpenAIEngine
from lmbridge.testing import EngineContract, JobContract, ScriptedEncoder, ScriptedEngine
from tests.engines.openai.conftest import far_end


class TestOpenAIEngine(EngineContract):
    """The engine keeps the contract with the far end's answers streamed over HTTP."""

    prompts = tuple(f"prompt number {number} of several" for number in range(6))
    long_prompt = "word " * 300
    follows_forms = False
    stall_timeout = 1.0

    @pytest.fixture(autouse=True)
    def _far(self) -> Iterator[None]:
        with far_end(ScriptedEngine(step_time=0.001)) as far:
            self.far = far
            yield

    def engine(self) -> Engine:
        return OpenAIEngine(self.far.url, max_batch_size=20)


class TestEmbed(JobContract):
    """It keeps that of engines that embed."""

    task = "embed"
    items = ("one", "two words", "three", "four", "five")

    @pytest.fixture(autouse=True)
    def _far(self) -> Iterator[None]:
        with far_end(ScriptedEncoder(max_length=8)) as far:
            self.far = far
            yield

    poison = "longer than the far end reads, which is at most eight words"

    def engine(self) -> Engine:
        return OpenAIEngine(self.far.url, max_batch_size=20, task="embed")


class TestRerank(JobContract):
    """And that of engines that rerank."""

    task = "rerank"
    items = ("what", "what is", "what is asked", "what is asked for", "none of it")

    @pytest.fixture(autouse=True)
    def _far(self) -> Iterator[None]:
        with far_end(ScriptedEncoder(tasks=["rerank"])) as far:
            self.far = far
            yield

    def engine(self) -> Engine:
        return OpenAIEngine(self.far.url, max_batch_size=20)
