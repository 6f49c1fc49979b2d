"""Engines that exit where they are given their place on a device."""

from __future__ import annotations

import pytest

from lmbridge import Bridge, Device, EngineStartError
from lmbridge.testing import ScriptedEngine


class Rude(ScriptedEngine):
    """Serves as others do, but for one attribute that a test puts in."""


def refuse(*_: object) -> None:
    raise SystemExit(5)


@pytest.mark.parametrize("attribute", ["name", "device", "party", "on_death"])
def test_an_engine_that_exits_as_it_moves_in(attribute: str) -> None:
    """The server thread would end, and with it every call, those of the model that serves too."""
    get = refuse if attribute in ("name", "device") else lambda engine: None
    rude = type("Ruder", (Rude,), {attribute: property(get, refuse)})
    with Bridge(ScriptedEngine) as bridge:
        with pytest.raises(EngineStartError, match=rf"SystemExit\(5\) was raised .*its {attribute}"):
            bridge.swap(rude)
        assert bridge.infer("and on", timeout=30).text == "and on"


def test_an_engine_whose_device_is_not_asked_for() -> None:
    """What an engine says of where it runs would keep it from a device that the user has chosen."""
    rude = type("Ruder", (Rude,), {"device": property(refuse)})
    with Bridge(rude, device=Device()) as bridge:
        assert bridge.infer("hello", timeout=30).text == "hello"
