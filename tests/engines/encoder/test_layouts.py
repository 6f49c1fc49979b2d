"""Whatever way a batch goes through the model, each text gets what it gets alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lmbridge.errors import EngineStartError
from lmbridge.messages import Rerank
from tests.engines.encoder.conftest import FAMILIES, MIXED, alone, apart, driven, save_model, score_alone

FASTEST = {
    "bert": "packed",
    "roberta": "packed",
    "xlm-roberta": "packed",
    "modernbert": "packed",
    "distilbert": "packed",
    "mpnet": "grouped",  # its relative positions run over the whole row
    "qwen3": "packed",
    "mistral": "packed",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_gets_what_it_gets_alone(tmp_path: Path, family: str) -> None:
    """A neighbour in the batch would change a text's vector, or an architecture would be served slower than it can."""
    folder = save_model(tmp_path, family)
    pooling = "lasttoken" if family in ("qwen3", "mistral") else "mean"

    async def scenario(layout: str) -> None:
        async with driven(folder, layout=layout, pooling=pooling) as driver:
            if layout == "auto":
                assert driver.layout == FASTEST[family]
            texts = [*MIXED, "the [PAD] cat"]  # RoBERTa gives such a token no position
            for text, vector in zip(texts, await driver.ask_all(texts), strict=True):
                assert apart(vector, alone(folder, text, pooling)) <= 1e-5

    for layout in ("auto", "grouped", "single"):
        asyncio.run(scenario(layout))


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "mistral"])
def test_packed_as_on_a_gpu(tmp_path: Path, family: str) -> None:
    """There, texts of similar length are attended to in one call; a text would see its neighbour, or its padding."""
    folder = save_model(tmp_path, family)

    async def scenario() -> None:
        async with driven(folder) as driver:
            core: Any = driver.engine._core
            core.layout._slack = 2.0
            for text, vector in zip(MIXED, await driver.ask_all(MIXED), strict=True):
                assert apart(vector, alone(folder, text)) <= 1e-5

    asyncio.run(scenario())


@pytest.mark.parametrize(("length", "layout"), [(None, "single"), (250, "packed")])
def test_positions_that_follow_the_longest_text(tmp_path: Path, length: int | None, layout: str) -> None:
    """A short text would get another vector beside a long one, which the short texts at the start do not show."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 1.2,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 250,
    }
    folder = save_model(tmp_path, "qwen3", rope_parameters=rope)

    async def scenario() -> None:
        async with driven(folder, pooling="lasttoken", max_length=length) as driver:
            assert driver.layout == layout
            texts = [*MIXED, *([] if length else ["the cat " * 140])]
            for text, vector in zip(texts, await driver.ask_all(texts), strict=True):
                assert apart(vector, alone(folder, text, "lasttoken")) <= 1e-5
        if length is None:
            with pytest.raises(EngineStartError, match="longrope positions follow the longest text"):
                async with driven(folder, pooling="lasttoken", layout="grouped"):
                    pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("family", "labels", "fastest"),
    [
        ("bert", 1, "packed"),
        ("bert", 2, "packed"),
        ("roberta", 1, "packed"),
        ("distilbert", 1, "packed"),
        ("modernbert", 1, "packed"),
        ("qwen3", 1, "grouped"),
    ],
)
def test_each_pair_gets_the_score_it_gets_alone(tmp_path: Path, family: str, labels: int, fastest: str) -> None:
    """A document's rank would hang on which others were in its batch."""
    folder = save_model(tmp_path, family, head="ForSequenceClassification", num_labels=labels)

    async def scenario(layout: str) -> None:
        async with driven(folder, layout=layout) as driver:
            if layout == "auto":
                assert driver.layout == fastest
            scores = await driver.ask_all([Rerank("where did the cat go", text) for text in MIXED])
            for text, score in zip(MIXED, scores, strict=True):
                assert isinstance(score, float)
                assert abs(score - score_alone(folder, "where did the cat go", text)) <= 1e-5

    for layout in ("auto", "grouped", "single"):
        asyncio.run(scenario(layout))
