"""``install``: code that imports ``lmdeploy`` gets the drop-in, without being edited.

Rule: any thread; the importing package decides. LMDeploy's own modules and ours get LMDeploy, everyone else the
drop-in: so the engine keeps using the real package, and a script's imports do not depend on what is installed. No
module is replaced: a module finder does not know who imports, and LMDeploy imports its own modules by name.
"""

from __future__ import annotations

import builtins
import importlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

_NAME = "lmdeploy"
_MODULES = frozenset({_NAME, *(f"{_NAME}.{name}" for name in ("api", "messages", "model", "pipeline", "vl"))})
"""LMDeploy's modules with a counterpart here; the others are never redirected."""
_EXEMPT = frozenset({_NAME, "lmbridge"})

_lock = threading.RLock()  # held while installing or uninstalling
_current: Installation | None = None  # written under _lock, as a whole; any thread may read it


class Installation(AbstractContextManager["Installation"]):
    """What ``install`` has set up, until ``uninstall()`` or the end of its ``with``.

    Attributes:
        backend: the engine of pipelines built without one; None lets ``pipeline`` choose.
        model: the model of all pipelines; None keeps the one given in the code.
    """

    def __init__(self, backend: str | None, model: str | None) -> None:
        self.backend = backend
        self.model = model
        self._active = False  # written under _lock, read by any thread; another hook may still call ours
        self._next = builtins.__import__  # what was there before; written under _lock
        self._hook = self._import  # one object, so that it can be recognised

    def uninstall(self) -> None:
        """Undo the redirection; names already imported stay as they are. Any thread."""
        global _current
        with _lock:
            self._active = False
            if builtins.__import__ is self._hook:
                builtins.__import__ = self._next
            if _current is self:
                _current = None

    def _install(self) -> None:
        """Replace the previous installation. Under _lock."""
        global _current
        if _current is not None:
            _current.uninstall()
        self._next = builtins.__import__
        self._active = True
        _current = self
        builtins.__import__ = self._hook

    def __exit__(self, *exc_info: object) -> None:
        self.uninstall()

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """Called by import statements; returns the module itself if there is a ``fromlist``, else its top package."""
        root = name.partition(".")[0]
        if not self._active or level or root != _NAME or _importer(globals) in _EXEMPT:
            return self._next(name, globals, locals, fromlist, level)
        if name not in _MODULES:
            found = self._next(name, globals, locals, fromlist, level)
            return found if fromlist else _counterpart(root)
        return _counterpart(name if fromlist else root)


def install(*, backend: str | None = None, model: str | None = None) -> Installation:
    """Make ``import lmdeploy`` and ``from lmdeploy import …`` give the drop-in, everywhere in this process.

    Affects import statements of ``lmdeploy`` and its modules ``api``, ``messages``, ``model``, ``pipeline`` and ``vl``,
    except those in LMDeploy and lmbridge themselves; ``importlib.import_module`` is not affected. A second call
    replaces the first.

    Args:
        backend: an engine's name, for pipelines built without a ``backend``.
        model: what all pipelines load, whatever path they are given.

    Returns:
        An object that undoes it, by ``uninstall()`` or as a context manager.
    """
    installation = Installation(backend, model)
    try:
        with _lock:
            installation._install()
        return installation
    except BaseException:  # Ctrl-C: the caller will never get the object to undo it
        installation.uninstall()
        raise


def chosen(model: Any, backend: str | None) -> tuple[Any, str | None]:
    """The model and backend of a pipeline, overridden by ``install``."""
    current = _current  # one read: another thread may uninstall it
    if current is None or not (isinstance(model, str) or hasattr(model, "__fspath__")):
        return model, backend
    return current.model or model, backend or current.backend


def _importer(globals: Mapping[str, object] | None) -> str:
    """The package of the code that imports."""
    return str((globals or {}).get("__name__", "")).partition(".")[0]


def _counterpart(name: str) -> Any:
    return importlib.import_module(f"lmbridge.compat.{name}")
