"""The engine contract on a real Ray: the bundled model, and a scripted encoder, on two replicas each."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip('needs Ray Serve: pip install "lmbridge[ray]"', allow_module_level=True)

from lmbridge import Engine
from lmbridge.engines.ray import RayEngine
from lmbridge.messages import Task
from lmbridge.testing import EngineContract, JobContract
from tests.engines.ray.conftest import Deploy
from tests.engines.ray.inner import encoder

pytestmark = pytest.mark.timeout(240)  # the first test starts Ray


class TestRayEngine(EngineContract):
    """The Ray engine keeps the contract."""

    prompts = (
        "What is the capital of France?",
        "What is 12 + 13?",
        "What is the opposite of hot?",
        "What colour is grass?",
        "Tell me a short story about an owl.",
    )
    long_prompt = "Tell me a long story about a fox."
    poison = (10**9,)

    @pytest.fixture(autouse=True)
    def _app(self, deployed: Deploy) -> None:
        self.app = deployed("demo", model="demo", replicas=2, max_batch_size=4)

    def engine(self) -> Engine:
        return RayEngine(self.app, deploy=False)


class _Jobs(JobContract):
    @pytest.fixture(autouse=True)
    def _app(self, deployed: Deploy) -> None:
        self.app = deployed(self.task, model="", inner_engine=encoder, replicas=2, tasks=(self.task,))

    def engine(self) -> Engine:
        return RayEngine(self.app, deploy=False)


class TestEmbed(_Jobs):
    """Vectors come back from replicas, each to its own text."""

    task: Task = "embed"
    items = ("one", "two words", "three", "four", "five")


class TestRerank(_Jobs):
    """Scores come back from replicas, each to its own document."""

    task: Task = "rerank"
    items = ("what", "what is", "what is asked", "what is asked for", "none of it")
