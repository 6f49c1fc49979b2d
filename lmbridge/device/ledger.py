"""The memory of a device: who holds how much, who loads, and who waits for room.

Rule: any thread; nothing waits in here. A load that waits for room asks again when woken, and from time to time. The
ledger counts what models were said to need and hold; it does not measure the device.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterable
from time import monotonic

from lmbridge.device.sizes import in_words
from lmbridge.device.tenant import Holding, Tenant
from lmbridge.errors import EngineStartError
from lmbridge.log import logger

PATIENT = 10.0
"""For this many seconds a waiting load lets smaller ones pass; then all others wait behind it."""
SLOW = 60.0
"""After this many seconds a running load, whose room is reserved, no longer delays others."""


class Ledger:
    """The memory of one device.

    If it is limited, loads are served one at a time, first come first served; for a while, loads that fit may pass one
    that does not. Loads of unknown size are not counted here and pass.

    Attributes:
        limit: bytes for all; None: unlimited, or not known yet.
        loads, unloads: models loaded, and models unloaded to make room or because they were idle.
    """

    def __init__(self, name: str) -> None:
        self.limit: int | None = None
        self.loads = self.unloads = 0
        self._name = name
        self._lock = threading.Lock()
        # Guarded by _lock. Held weakly: a killed server thread cannot give anything back.
        self._held: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._line: list[weakref.ref[Holding]] = []  # loads waiting for room, in order
        self._loading: weakref.ref[Holding] | None = None
        self._loading_since = 0.0

    # --- a holding, from request to release ---

    def ask(self, holding: Holding) -> str:
        """Reserve what a load needs: "" on success, else what it waits for; then ask again.

        Idle models are asked to unload if that makes enough room.

        Raises:
            EngineStartError: it can never fit, and no longer waits.
        """
        with self._lock:
            if holding in self._held:
                return ""
            self._stand(holding)
            never = self._never(holding)
            if never:
                self._strike_out(holding)
            why, leaving = ("", list[Tenant]()) if never else self._why_not(holding)
            if not never and not why:
                self._strike_out(holding)
                self._held.add(holding)
                self._loading, self._loading_since = weakref.ref(holding), monotonic()
        if never:
            self.stir()
            raise EngineStartError(never)
        for tenant in leaving:
            tenant.guest.ask_to_unload(f"{holding.label} needs the memory")
        return why

    def settle(self, holding: Holding, size: int | None) -> None:
        """The engine is loaded and holds ``size`` bytes; None: as many as estimated."""
        with self._lock:
            holding.measured = True
            holding.size = holding.size if size is None else size
            self._held.add(holding)
            self._end_loading(holding)
            self.loads += 1
            over = 0 if self.limit is None else self._sum() - self.limit
            leaving = self._who_could_leave(holding, over) if over > 0 else []
        if over > 0:
            logger.warning(
                "Models exceed the memory limit by %s on %s; %s turned out to need %s.",
                in_words(over), self._name, holding.label, in_words(holding.size),
            )  # fmt: skip
        for tenant in leaving:
            tenant.guest.ask_to_unload(f"{holding.label} needs more memory than estimated")
        self.stir()

    def passes(self, holding: Holding) -> None:
        """The engine is about to close, which may take a while."""
        holding.passing = True

    def leave(self, holding: Holding) -> None:
        """The engine is gone or was never loaded. Any thread; idempotent."""
        with self._lock:
            self._held.discard(holding)
            self._strike_out(holding)
            self._end_loading(holding)
        self.stir()

    def stir(self) -> None:
        """Make waiting loads ask again. Takes no lock."""
        if self._line:
            for holding in self._waiting():
                holding.wake()

    def count_unload(self) -> None:
        """Count a model unloaded to make room or because it was idle."""
        with self._lock:
            self.unloads += 1

    # --- inspection ---

    @property
    def reserved(self) -> int:
        """Bytes that models hold or have reserved."""
        with self._lock:
            return self._sum()

    @property
    def loading(self) -> str | None:
        """The label of the model being loaded."""
        with self._lock:
            holding = self._now_loading()
            return None if holding is None else holding.label

    def of(self, tenant: Tenant) -> int:
        """Bytes held by a tenant."""
        with self._lock:
            return sum(holding.size for holding in self._held if holding.tenant is tenant)

    # --- with the lock held ---

    def _sum(self) -> int:
        return sum(holding.size for holding in self._held)

    def _waiting(self) -> list[Holding]:
        return [holding for reference in self._line[:] if (holding := reference()) is not None]

    def _now_loading(self) -> Holding | None:
        holding = None if self._loading is None else self._loading()
        return holding if holding is not None and holding in self._held and not holding.measured else None

    def _end_loading(self, holding: Holding) -> None:
        if self._loading is not None and self._loading() in (holding, None):
            self._loading = None

    def _stand(self, holding: Holding) -> None:
        if holding not in self._waiting():
            holding.since = monotonic()
            self._line.append(weakref.ref(holding))

    def _strike_out(self, holding: Holding) -> None:
        self._line = [weakref.ref(other) for other in self._waiting() if other is not holding]

    def _never(self, holding: Holding) -> str:
        """Why it can never fit; "" if it can once others have gone."""
        if self.limit is None or holding.size <= self.limit - self._stuck(holding):
            return ""
        own = any(other.tenant is holding.tenant for other in self._staying(holding))
        advice = (
            "Give it a smaller dtype or, if it has a cache, a smaller cache; pin fewer models, or raise the device's "
            "memory limit."
        )
        if own:
            advice = "Use swap(overlap=False), which frees the old model first."
        return (
            f"{holding.label} needs {in_words(holding.size)} of {self._name}, where models may use "
            f"{in_words(self.limit)}{_held_by(self._staying(holding), ', of which stay in use: ')}. {advice}"
        )

    def _stuck(self, holding: Holding) -> int:
        return sum(other.size for other in self._staying(holding))

    def _staying(self, holding: Holding) -> list[Holding]:
        """Holdings that will not make room for it: pinned models, the one it replaces, and those being replaced by
        others that also wait, one of which must give way.
        """
        waiting = {other.tenant for other in self._waiting() if other is not holding}
        return [
            other
            for other in self._held
            if not other.passing
            and other.measured
            and (other.tenant is holding.tenant or other.tenant.pinned or other.tenant in waiting)
        ]

    def _why_not(self, holding: Holding) -> tuple[str, list[Tenant]]:
        """What it waits for ("" for nothing), and whom to ask to unload for it."""
        if self.limit is None:
            return "", []
        loading = self._now_loading()
        if loading is not None and monotonic() - self._loading_since < SLOW:
            return f"waiting until {loading.label} is loaded on {self._name}", []
        free = self.limit - self._sum()
        ahead = self._ahead_of(holding, free)
        if ahead is not None:
            return f"waiting for memory on {self._name}, after {ahead.label}", []
        if holding.size <= free:
            return "", []
        why = (
            f"waiting for memory on {self._name}: needs {in_words(holding.size)}, {in_words(max(0, free))} free"
            f"{_held_by(self._held, ', held by ')}"
        )
        return why, self._who_could_leave(holding, holding.size - free)

    def _ahead_of(self, holding: Holding, free: int) -> Holding | None:
        """Who must be served before it; one that fits passes those that do not, unless they waited long."""
        before = list(itertools.takewhile(lambda other: other is not holding, self._waiting()))
        if holding.size > free:
            return before[0] if before else None
        late = monotonic() - PATIENT
        return next((other for other in before if other.size <= free or other.since < late), None)

    def _who_could_leave(self, holding: Holding, wanted: int) -> list[Tenant]:
        """Idle tenants that together hold ``wanted`` bytes, longest idle first; none if they cannot.

        Memory about to be freed anyway counts first.
        """
        wanted -= sum(other.size for other in self._held if other.passing)
        idle: dict[Tenant, float] = {}
        for other in self._held:
            if other.size and not other.tenant.pinned and other.tenant is not holding.tenant and not other.passing:
                with contextlib.suppress(Exception):
                    since = other.tenant.guest.idle_since
                    if since is not None:
                        idle[other.tenant] = since
        leaving = []
        for tenant in sorted(idle, key=lambda tenant: idle[tenant]):
            if wanted <= 0:
                break
            leaving.append(tenant)
            wanted -= sum(other.size for other in self._held if other.tenant is tenant)
        return leaving if wanted <= 0 else []


def _held_by(holdings: Iterable[Holding], words: str) -> str:
    named = [f"{other.label} ({in_words(other.size)})" for other in holdings if other.size]
    return words + ", ".join(sorted(named)) if named else ""
