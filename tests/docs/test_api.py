"""Every public name is in the reference: docs/api.rst, or the page that it is at home on."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lmbridge.engines import ENGINES

DOCS = Path(__file__).parents[2] / "docs"
DIRECTIVE = re.compile(
    r"^\.\. (?:py:)?(currentmodule|automodule|autoclass|autoexception|autofunction|autodata|data):: (\S+)"
    r"\n((?:   :.*\n)*)",
    re.MULTILINE,
)
MODULES = [
    "lmbridge", "lmbridge.compat.lmdeploy", "lmbridge.device", "lmbridge.flask", "lmbridge.flask.openai",
    "lmbridge.flask.rerank", "lmbridge.testing",
]  # fmt: skip
FURTHER = [  # of modules without an __all__
    "lmbridge.flask.operations.blueprint", "lmbridge.flask.playground.blueprint",
    "lmbridge.flask.testing.scripted_encoder", "lmbridge.flask.testing.scripted_engine",
    "lmbridge.metrics.Histogram", "lmbridge.metrics.Metrics",
    "lmbridge.prometheus.BridgeCollector", "lmbridge.prometheus.DeviceCollector",
    *(".".join(home) for home in ENGINES.values()),
]  # fmt: skip


def documented(page: str) -> set[str]:
    """The whole names of what a page documents."""
    module, names = "", set()
    for kind, name, options in DIRECTIVE.findall(page):
        if kind in ("currentmodule", "automodule"):
            module = name
            members = re.search(r":members: (.+)", options)
            names |= {f"{name}.{member}" for member in members[1].split(", ")} if members else set()
        else:
            names.add(name if name.startswith("lmbridge.") else f"{module}.{name}")
    return names


def found(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.fixture(scope="module")
def reference() -> set[str]:
    return set().union(*(documented(page.read_text("utf-8")) for page in DOCS.rglob("*.rst")))


def test_every_public_name_is_in_the_reference(reference: set[str]) -> None:
    """Whoever looks a name up finds what it takes and raises; one that was documented elsewhere is the same object."""
    known = {id(found(name)) for name in reference}
    public = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]
    assert [name for name in [*public, *FURTHER] if name not in reference and id(found(name)) not in known] == []
