"""Models for llama.cpp, made once. Tests here need xllamacpp: ``pip install "lmbridge[llamacpp]"``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def demo(folder: Path) -> str:
    """The bundled model."""
    from tests.engines.llamacpp.models import write_demo

    return write_demo(folder / "demo.gguf")


@pytest.fixture(scope="session")
def encoder(folder: Path) -> str:
    """A random model that makes vectors."""
    from tests.engines.llamacpp.models import write_encoder

    return write_encoder(folder / "encoder.gguf")


@pytest.fixture(scope="session")
def reranker(folder: Path) -> str:
    """A random model that scores documents."""
    from tests.engines.llamacpp.models import write_encoder

    return write_encoder(folder / "reranker.gguf", scores=True)
