"""Engines of different kinds in one process: what one sets for all of transformers or torch must not be the other's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

from lmbridge import Bridge
from tests.engines.conftest import save_model as save_language_model
from tests.engines.encoder.conftest import MIXED, save_model

PROMPTS = ["the cat", "a dog and a cat", "stock prices fell", "where did the old sailor go"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A language model and an encoder."""
    folder: Path = tmp_path_factory.mktemp("both")
    return save_language_model(folder / "language"), save_model(folder / "encoder")


def answers(bridge: Bridge) -> list[str]:
    """All at once, so that they share steps."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: bridge.infer(prompt, max_new_tokens=12, do_sample=False).text, PROMPTS))


@pytest.mark.parametrize("first", ["language", "encoder"])
def test_a_language_model_and_an_encoder(models: tuple[str, str], first: str) -> None:
    """Each answers as it does alone, whichever was loaded first, and they compute at the same time."""
    language, encoder = models
    with Bridge(language) as alone:
        expected = answers(alone)
    with Bridge(encoder, engine="encoder") as alone:
        vectors = alone.embed(MIXED)
    bridges = {"language": Bridge(language), "encoder": Bridge(encoder, engine="encoder")}
    with bridges[first], bridges["encoder" if first == "language" else "language"], ThreadPoolExecutor(1) as pool:
        for bridge in (bridges[first], *bridges.values()):
            bridge.start()
        embedding = pool.submit(lambda: [bridges["encoder"].embed(MIXED) for _ in range(5)])
        for _ in range(5):
            assert answers(bridges["language"]) == expected
        for found in embedding.result(60):
            numpy.testing.assert_allclose(found, vectors, atol=1e-5)
