"""The engine contract on LMDeploy's real control plane; the GPU executor alone is scripted."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from lmbridge import Engine
from lmbridge.engines.lmdeploy import LMDeployEngine
from lmbridge.testing import EngineContract
from tests.engines.lmdeploy_scripted import scripted_gpu


class TestLMDeployEngine(EngineContract):
    """The LMDeploy engine keeps the contract."""

    prompts = tuple(f"prompt number {number} of several" for number in range(6))
    long_prompt = "word " * 60
    poison = (10**9,)
    follows_forms = False

    @pytest.fixture(autouse=True)
    def _gpu(self, llama: str) -> Iterator[None]:
        self.model = llama
        with scripted_gpu():
            yield

    def engine(self) -> Engine:
        return LMDeployEngine(self.model, backend="pytorch", max_batch_size=4)
