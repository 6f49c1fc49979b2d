"""When an idle model is unloaded, and when it is loaded again.

Rule: server thread only, except ``Lodging``, which others read, and the end of the last call, which any thread may
report.
"""

from __future__ import annotations

from collections.abc import Callable

from lmbridge.server.calls import Calls
from lmbridge.server.lodging import Lodging
from lmbridge.server.swaps import Recipe


class Rest:
    """Decides this for one supervisor.

    Args:
        look: makes the supervisor check again; any thread.

    Attributes:
        wanted: the model is unloaded, and a call or request needs it.
        over: why a model that was unloaded or put off is being loaded now.
    """

    def __init__(self, lodging: Lodging, calls: Calls, look: Callable[[], None]) -> None:
        self.wanted = False
        self.over = ""
        self._lodging = lodging
        self._calls = calls
        self._look = look
        self._asked = ""  # why others need the memory
        self._works = False  # it did when ``patience`` was last asked
        calls.on_idle = self._on_idle

    @property
    def unloaded(self) -> bool:
        """Whether the idle engine was unloaded."""
        return self._calls.on_arrival is not None

    @property
    def pending(self) -> bool:
        """Whether something must be done at once."""
        return self.wanted or (bool(self._asked) and self._lodging.may_rest)

    def ask(self, why: str) -> None:
        """Others need the memory."""
        if self._lodging.may_rest:
            self._asked = why
            self._look()

    def due(self) -> str:
        """Why to unload the model now; "" to keep it."""
        asked, self._asked = self._asked, ""
        if self._lodging.idle_since is None:
            return ""
        return asked or ("it was idle" if self._lodging.rest_due() == 0 else "")

    def patience(self) -> float | None:
        """Seconds after which to ask ``due`` again, if nothing else happens; None: no need."""
        self._works = self._lodging.works
        return self._lodging.rest_due()

    def begin(self) -> None:
        """The model is being unloaded."""
        self.over = "it was unloaded and is being loaded again"
        self._lodging.may_rest = False
        self._calls.on_arrival = self.want

    def put_off(self) -> None:
        """The model stopped waiting for room, and will be loaded after what came in between."""
        self.begin()
        self.over = "a swap came first"
        self.wanted = True

    def want(self) -> None:
        """Request the model again if it is unloaded."""
        if self.unloaded:
            self.wanted = True
            self._look()

    def end(self) -> None:
        """This model or another is being loaded."""
        self.wanted = False
        self._calls.on_arrival = None

    def busy(self) -> None:
        """A swap is under way that needs or replaces the model, or the engine has died."""
        self._lodging.may_rest = False

    def serves(self, recipe: Recipe) -> None:
        """An engine made from this recipe serves from now on."""
        self._lodging.label = recipe.label
        self._lodging.may_rest = recipe.rebuildable
        if not self._calls.living:
            self._lodging.is_idle()

    def _on_idle(self) -> None:
        """The last call has ended."""
        self._lodging.is_idle()
        if self._works:
            self._works = False
            self._look()
