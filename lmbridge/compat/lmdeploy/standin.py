"""``install``: code that imports ``lmdeploy`` gets the drop-in, without an edit.

Rule: any thread, and who asks decides. LMDeploy's own modules and ours get LMDeploy, everybody else the drop-in; so the
engine works on with the real package, and what a script gets does not depend on what is installed. No module is
replaced: a finder of modules does not know who asks, and LMDeploy goes on importing its own modules by their names.
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
"""LMDeploy's modules that have a counterpart here; its others are its own for everybody."""
_EXEMPT = frozenset({_NAME, "lmbridge"})

_lock = threading.RLock()  # held while an installation comes or goes
_current: Installation | None = None  # written under _lock, as a whole; any thread may read it


class Installation(AbstractContextManager["Installation"]):
    """What ``install`` has set up, until ``uninstall()`` or the end of its ``with``.

    Attributes:
        backend: the engine of pipelines that name none; None leaves the choice to ``pipeline``.
        model: the model of all pipelines; None leaves it to the code that builds them.
    """

    def __init__(self, backend: str | None, model: str | None) -> None:
        self.backend = backend
        self.model = model
        self._active = False  # written under _lock, read by any thread; the hook may stay below somebody else's
        self._next = builtins.__import__  # what was there before; written under _lock
        self._hook = self._import  # one object, to be recognised by

    def uninstall(self) -> None:
        """Let ``lmdeploy`` be LMDeploy again; names that were imported meanwhile stay what they are. Any thread."""
        global _current
        with _lock:
            self._active = False
            if builtins.__import__ is self._hook:
                builtins.__import__ = self._next
            if _current is self:
                _current = None

    def _install(self) -> None:
        """Take the place of the one before. Under _lock."""
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
        """What an import statement calls; with a ``fromlist`` it wants the module, without the first of its names."""
        root = name.partition(".")[0]
        if not self._active or level or root != _NAME or _importer(globals) in _EXEMPT:
            return self._next(name, globals, locals, fromlist, level)
        if name not in _MODULES:
            found = self._next(name, globals, locals, fromlist, level)
            return found if fromlist else _counterpart(root)
        return _counterpart(name if fromlist else root)


def install(*, backend: str | None = None, model: str | None = None) -> Installation:
    """From now on ``import lmdeploy`` and ``from lmdeploy import …`` give the drop-in, everywhere in this process.

    It takes import statements of ``lmdeploy`` and its modules ``api``, ``messages``, ``model``, ``pipeline`` and
    ``vl``; those that LMDeploy and lmbridge make themselves are left alone, and so is ``importlib.import_module``. A
    second call replaces the first.

    Args:
        backend: an engine's name, for pipelines built without a ``backend``.
        model: what all pipelines load, whatever path they are given.

    Returns:
        What undoes it, by ``uninstall()`` or as a context manager.
    """
    installation = Installation(backend, model)
    try:
        with _lock:
            installation._install()
        return installation
    except BaseException:  # Ctrl-C: nobody will have it to undo it with
        installation.uninstall()
        raise


def chosen(model: Any, backend: str | None) -> tuple[Any, str | None]:
    """The model and the backend of a pipeline, where ``install`` has said more than its caller."""
    current = _current  # one read: another thread may uninstall it
    if current is None or not (isinstance(model, str) or hasattr(model, "__fspath__")):
        return model, backend
    return current.model or model, backend or current.backend


def _importer(globals: Mapping[str, object] | None) -> str:
    """The package of the code that imports."""
    return str((globals or {}).get("__name__", "")).partition(".")[0]


def _counterpart(name: str) -> Any:
    return importlib.import_module(f"lmbridge.compat.{name}")
