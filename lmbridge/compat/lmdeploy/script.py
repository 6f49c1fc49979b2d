"""A script that imports ``lmdeploy``, run on the drop-in like ``python script.py``.

Rule: the main thread, before anything else runs. The script's module stays ``__main__`` after the script ends, because
its threads may go on.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from typing import Any

from lmbridge.compat.lmdeploy.standin import install

_ENVIRONMENT = "LMBRIDGE_RUN"  # instructions for processes that the script spawns, as JSON
_SPAWNED = "lmbridge.compat.lmdeploy.spawned"


class Script:
    """A script that has been read.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = os.path.abspath(path)
        self._loader = SourceFileLoader("__main__", self._file)
        self._source = self._loader.get_data(self._file)

    def run(self, arguments: Sequence[str], *, backend: str | None = None, model: str | None = None) -> None:
        """Run it as ``__main__`` on the drop-in, with ``sys.argv`` and ``sys.path`` set for it.

        Args:
            backend, model: as for ``install``.

        Raises:
            BaseException: what the script raises, SystemExit included.
        """
        install(backend=backend, model=model)
        os.environ[_ENVIRONMENT] = json.dumps({"file": self._file, "backend": backend, "model": model})
        sys.argv = [self._path, *arguments]
        if not getattr(sys.flags, "safe_path", False):  # safe_path omits the script's entry
            sys.path[0] = os.path.dirname(os.path.realpath(self._file))
        main = types.ModuleType("__main__")
        main.__dict__.update(__builtins__=builtins, __file__=self._file, __loader__=self._loader)
        main.__spec__ = find_spec(_SPAWNED)  # imported by spawned processes of multiprocessing
        sys.modules["__main__"] = main
        exec(self._loader.source_to_code(self._source, self._file), main.__dict__)

    def show(self, error: BaseException) -> None:
        """Print its exception as Python does, without the frames that called it."""
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_code.co_filename != self._file:
            traceback = traceback.tb_next  # the end, if the file does not compile
        error.__traceback__ = traceback
        sys.excepthook(type(error), error, traceback)


def run_again(namespace: dict[str, Any]) -> None:
    """In a process spawned by the script: repeat ``Script.run`` into ``namespace``."""
    told = json.loads(os.environ[_ENVIRONMENT])
    install(backend=told["backend"], model=told["model"])
    file = sys.argv[0] = told["file"]
    loader = SourceFileLoader(namespace["__name__"], file)
    namespace.update(__file__=file, __loader__=loader, __doc__=None)
    exec(loader.source_to_code(loader.get_data(file), file), namespace)
