"""When a model that has nothing to do is unloaded, and when it is wanted again.

Rule: server thread only, but for ``Lodging``, which others read, and for the end of the last call, which is told by
whoever ends it.
"""

from __future__ import annotations

from collections.abc import Callable

from lmbridge.server.calls import Calls
from lmbridge.server.lodging import Lodging
from lmbridge.server.swaps import Recipe


class Rest:
    """Judges it for one supervisor.

    Args:
        look: has the supervisor look at this again; for any thread.

    Attributes:
        wanted: the model is unloaded, and a call has come or somebody has asked for it.
        over: why a model that was unloaded or put off is loaded now.
    """

    def __init__(self, lodging: Lodging, calls: Calls, look: Callable[[], None]) -> None:
        self.wanted = False
        self.over = ""
        self._lodging = lodging
        self._calls = calls
        self._look = look
        self._asked = ""  # why others want the memory
        self._works = False  # it did when the supervisor was last told for how long to wait
        calls.on_idle = self._on_idle

    @property
    def unloaded(self) -> bool:
        """Whether there is no engine because it had nothing to do."""
        return self._calls.on_arrival is not None

    @property
    def pending(self) -> bool:
        """Whether there is something to do at once."""
        return self.wanted or (bool(self._asked) and self._lodging.may_rest)

    def ask(self, why: str) -> None:
        """Others would have the memory."""
        if self._lodging.may_rest:
            self._asked = why
            self._look()

    def due(self) -> str:
        """Why the model is to be unloaded now; "" if it is not."""
        asked, self._asked = self._asked, ""
        if self._lodging.idle_since is None:
            return ""
        return asked or ("it was idle" if self._lodging.rest_due() == 0 else "")

    def patience(self) -> float | None:
        """Seconds after which ``due`` is worth asking, if nothing else comes; None: for as long as it takes."""
        self._works = self._lodging.works
        return self._lodging.rest_due()

    def begin(self) -> None:
        """The model is being unloaded."""
        self.over = "it had been unloaded, and is loaded again"
        self._lodging.may_rest = False
        self._calls.on_arrival = self.want

    def put_off(self) -> None:
        """The model has given up its wait for room, and is to be loaded after what came between."""
        self.begin()
        self.over = "a swap came between"
        self.wanted = True

    def want(self) -> None:
        """Have the model loaded again, if it is unloaded."""
        if self.unloaded:
            self.wanted = True
            self._look()

    def end(self) -> None:
        """The model is being loaded again, or another is."""
        self.wanted = False
        self._calls.on_arrival = None

    def busy(self) -> None:
        """A swap is under way, which needs the model or takes its place; or the engine has died."""
        self._lodging.may_rest = False

    def serves(self, recipe: Recipe) -> None:
        """An engine that was made so serves from now on."""
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
