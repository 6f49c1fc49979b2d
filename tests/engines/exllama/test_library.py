"""What the ExLlama engines say when their library is missing, cannot be built, or has changed; and their options."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from typing import Any

import pytest

from lmbridge import InvalidRequestError, MissingDependencyError
from lmbridge.engines import engine_class, engine_factory
from lmbridge.engines.exllama.library import V2, V3, Parts
from tests.engines.exllama import scripted_cuda

BOTH = (V2, V3)
NAMES = ("exllamav2", "exllamav3")


@pytest.mark.parametrize("parts", BOTH, ids=NAMES)
def test_the_tried_version_has_what_is_relied_on(parts: Parts) -> None:
    """All names that the adapter touches are there, on the library's own classes; one that goes is named."""
    if importlib.util.find_spec(parts.package) is None:
        pytest.skip(f"needs {parts.package}; .ci/run installs it without CUDA")
    (scripted_cuda.import_v2 if parts is V2 else scripted_cuda.import_v3)()
    parts.check()
    changed = dataclasses.replace(parts, members={f"{parts.package}:Gone": ("anything",)})
    with pytest.raises(MissingDependencyError, match=f"Gone.*{parts.tried}"):
        changed.check()


@pytest.mark.parametrize("parts", BOTH, ids=NAMES)
def test_a_missing_library_names_its_command(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not installed it reads how."""
    monkeypatch.setitem(sys.modules, parts.package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'lmbridge\[{parts.package}\]'"):
        parts.check()


@pytest.mark.parametrize("parts", BOTH, ids=NAMES)
def test_a_library_that_cannot_be_built_says_what_it_needs(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index has sources, which are compiled at the first import; where that fails, the message helps."""

    def fail(name: str) -> Any:
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError, match=r"CUDA_HOME.*nvcc"):
        parts.check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "cpu"),
        ("gpu_split", []),
        ("gpu_split", [20, -1]),
        ("tp", 0),
        ("max_batch_size", None),
        ("max_chunk_size", 100),
        ("max_context", 1),
        ("cache_tokens", 1000),
        ("cache_bits", 5.0),
        ("cache_bits", 1),
        ("revision", 3),
        ("threads", 4),
    ],
)
def test_wrong_options_are_named(name: str, option: str, value: object) -> None:
    """A value that cannot be is refused when the bridge is made, by its name."""
    with pytest.raises(InvalidRequestError, match=option) as caught:
        engine_factory(name, "demo", {option: value})
    assert caught.value.param == option


@pytest.mark.parametrize("name", NAMES)
def test_contradictions_are_named(name: str) -> None:
    """One GPU and several are not both meant."""
    with pytest.raises(InvalidRequestError, match="give only one"):
        engine_class(name)("demo", device="cuda:1", gpu_split=[20, 24])  # type: ignore[call-arg]


def test_the_widths_of_the_cache_differ() -> None:
    """V2 has caches of 16, 8, 6 and 4 bits, V3 of any width from 2 to 8."""
    with pytest.raises(InvalidRequestError, match="16, 8, 6, 4"):
        engine_factory("exllamav2", "demo", {"cache_bits": 3})
    engine_factory("exllamav3", "demo", {"cache_bits": 3})
