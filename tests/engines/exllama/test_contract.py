"""The engine contract on the real generators, jobs and page tables of ExLlamaV2 and V3; the kernels are scripted."""

from __future__ import annotations

from typing import ClassVar

import pytest

from lmbridge import Engine
from lmbridge.testing import EngineContract
from tests.engines.exllama.conftest import need, scripted

need("exllamav2", "exllamav3")


class _Contract(EngineContract):
    """The ExLlama engines keep the contract."""

    __test__ = False
    way: ClassVar[str]
    prompts = tuple(f"prompt number {number} of several!" for number in range(6))
    long_prompt = "word " * 20
    poison = (10**9,)
    stall_timeout = 1.0

    @pytest.fixture(autouse=True)
    def _scripted(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.make = scripted(monkeypatch, self.way, model)

    def engine(self) -> Engine:
        return self.make(max_batch_size=8)


class TestExLlamaV2(_Contract):
    """Without flash-attn, one request at a time."""

    __test__ = True
    way = "v2"
    workers = ("lmbridge exllamav2",)

    def test_a_forgotten_request_ends_alone(self) -> None:
        """In one place nothing goes on beside it, so that it is taken for a stall of the engine."""
        pytest.skip("one request at a time")


class TestExLlamaV2Paged(_Contract):
    """As with flash-attn, in batches."""

    __test__ = True
    way = "v2 paged"
    workers = ("lmbridge exllamav2",)


class TestExLlamaV3(_Contract):
    """In batches."""

    __test__ = True
    way = "v3"
    workers = ("lmbridge exllamav3",)
