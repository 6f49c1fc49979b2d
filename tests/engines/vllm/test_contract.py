"""The engine contract on vLLM's real engine, scheduler and CPU kernels."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs vLLM; tests/engines/vllm/run.sh installs its build for CPUs", allow_module_level=True)

from lmbridge import Engine
from lmbridge.testing import EngineContract
from tests.engines.vllm.conftest import QUIET, small

pytestmark = QUIET


class TestVLLMEngine(EngineContract):
    """The vLLM engine keeps the contract."""

    prompts = (
        "What is the capital of France?", "Tell me a story about a dog.", "Hello!", "Count to ten.",
        "Who are you?", "What colour is the sky?",
    )  # fmt: skip
    long_prompt = "Tell me a long story about a fox and a bear."
    poison = (10**9,)
    patience = 120.0
    stall_timeout = 20.0

    def engine(self) -> Engine:
        return small()
