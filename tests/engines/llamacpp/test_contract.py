"""The engine contract on llama.cpp itself, with the bundled model as a GGUF file; what is refused, and jobs."""

from __future__ import annotations

import pytest

pytest.importorskip("xllamacpp", reason='needs xllamacpp; run: pip install "lmbridge[llamacpp]"')

from lmbridge import Engine
from lmbridge.engines.llamacpp import LlamaCppEngine
from lmbridge.testing import EngineContract, JobContract


class TestLlamaCppEngine(EngineContract):
    """The llama.cpp engine keeps the contract."""

    prompts = (
        "What is the capital of France?",
        "What is the opposite of hot?",
        "What is 2 + 3?",
        "What can you do?",
        "What is the colour of the sky?",
    )
    long_prompt = "Tell me a story about a fox."
    poison = (10**9,)
    workers = ("lmbridge llamacpp slot",)
    stall_timeout = 1.5

    @pytest.fixture(autouse=True)
    def _model(self, demo: str) -> None:
        self.model = demo

    def engine(self) -> Engine:
        return LlamaCppEngine(self.model, max_batch_size=4, threads=1)


class TestVectors(JobContract):
    """A model that makes vectors keeps the contract of jobs."""

    task = "embed"
    items = ("a b c", "d e f g h a b c d e", "b", "c a f e")

    @pytest.fixture(autouse=True)
    def _model(self, encoder: str) -> None:
        self.model = encoder

    def engine(self) -> Engine:
        return LlamaCppEngine(self.model, max_batch_size=4, threads=1)


class TestScores(JobContract):
    """A model that scores documents keeps the contract of jobs."""

    task = "rerank"
    items = ("a b c", "d e f g h a b c d e", "b", "c a f e")

    @pytest.fixture(autouse=True)
    def _model(self, reranker: str) -> None:
        self.model = reranker

    def engine(self) -> Engine:
        return LlamaCppEngine(self.model, max_batch_size=4, threads=1)
