"""The engine contract on transformers with the bundled model."""

from __future__ import annotations

import pytest

from lmbridge import Engine
from lmbridge.engines.transformers import TransformersEngine
from lmbridge.testing import EngineContract


class TestTransformersEngine(EngineContract):
    """The transformers engine keeps the contract."""

    prompts = (
        "What is the capital of France?",
        "What is 12 + 13?",
        "What is the opposite of hot?",
        "What colour is grass?",
        "Tell me a short story about an owl.",
    )
    long_prompt = "Tell me a long story about a fox."
    poison = (10**9,)
    stall_timeout = 1.0
    workers = ("lmbridge generation",)

    def engine(self) -> Engine:
        return TransformersEngine("demo", max_batch_size=4)


@pytest.mark.long
class TestPlainRunner(TestTransformersEngine):
    """The transformers engine keeps the contract for models that batching does not serve, too."""

    def engine(self) -> Engine:
        return TransformersEngine("demo", max_batch_size=4, runner="plain")
