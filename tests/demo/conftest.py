"""One bridge over the bundled model for all tests here, and the questions its closed world holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmbridge import Bridge


@pytest.fixture(scope="module")
def demo() -> Iterator[Bridge]:
    """The bundled model, loaded once a module."""
    with Bridge("demo") as bridge:
        yield bridge
