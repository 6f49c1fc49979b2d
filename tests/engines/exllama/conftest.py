"""The three ways in which ExLlama generates, on scripted kernels; and a bridge over each."""

from __future__ import annotations

import gc
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.engines.exllama import ExLlamaEngine, ExLlamaV2Engine, ExLlamaV3Engine
from tests.engines.conftest import save_model
from tests.engines.exllama import scripted_cuda
from tests.engines.exllama.scripted_cuda import script

WAYS = ("v2", "v2 paged", "v3")
CACHE = 8192
PATIENCE = 10.0

Make = Callable[..., ExLlamaEngine]


def need(*packages: str) -> None:
    """Skip a module unless the packages are there; one that is installed and cannot be imported is a failure."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}; .ci/run installs it without CUDA", allow_module_level=True)


def scripted(patch: pytest.MonkeyPatch, way: str, model: str) -> Make:
    """What makes engines of a way, its library on scripted kernels."""
    if way == "v3":
        scripted_cuda.script_v3(patch)
    else:
        scripted_cuda.script_v2(patch, paged=way == "v2 paged")

    def make(**options: Any) -> ExLlamaEngine:
        engine = ExLlamaV3Engine if way == "v3" else ExLlamaV2Engine
        return engine(model, **{"cache_tokens": CACHE, "max_batch_size": 32, **options})

    return make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as both libraries take it; the weights in it are never read."""
    return save_model(tmp_path_factory.mktemp("models") / "exllama", max_position_embeddings=4096)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(way: str, model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A new engine of this way; in the end none may hold a model or a cache."""
    yield scripted(monkeypatch, way, model)
    script.gate.set()
    script.failure = None
    loaded, script.loaded = script.loaded, 0
    assert loaded == 0, "a model was not freed"
    end, tick = time.monotonic() + PATIENCE, threading.Event()
    while script.caches:  # a thread of the engine may hold what it has just been at
        gc.collect()
        assert time.monotonic() < end, "a cache was not freed"
        tick.wait(0.01)


@pytest.fixture
def bridge(make: Make) -> Iterator[Bridge]:
    with Bridge(make) as bridge:
        yield bridge
