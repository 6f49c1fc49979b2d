"""Scripted engines that say how much memory they need, and the models that they are of."""

from __future__ import annotations

import threading
from typing import Any

from lmbridge import Bridge, Device
from lmbridge.testing import ScriptedEngine

GB = 10**9


class Sized(ScriptedEngine):
    """Needs so many bytes, and holds them once it is loaded, or as many as it ``holds``."""

    def __init__(self, needs: int | None, holds: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._needs, self._holds = needs, holds

    def estimate(self) -> int | None:
        return self._needs

    def footprint(self) -> int | None:
        return self._holds if self._holds is not None else self._needs


class Model:
    """A factory of such engines, its name and those it has built."""

    def __init__(self, name: str, needs: int | None = GB, holds: int | None = None, **options: Any) -> None:
        self.__name__ = name
        self.built: list[Sized] = []
        self.gates: list[threading.Event | None] = []  # at which the next ones wait while they load
        self.errors: list[BaseException | None] = []  # which the next ones fail with
        self._needs, self._holds, self._options = needs, holds, options

    def __call__(self) -> Sized:
        gate = self.gates.pop(0) if self.gates else None
        error = self.errors.pop(0) if self.errors else None
        self.built.append(Sized(self._needs, self._holds, start_gate=gate, start_error=error, **self._options))
        return self.built[-1]

    def on(self, device: Device, **options: Any) -> Bridge:
        return Bridge(self, device=device, **options)


def held(device: Device) -> dict[str, int]:
    """Bytes by the label of who holds them."""
    return {party.label: party.bytes for party in device.status().parties if party.bytes}
