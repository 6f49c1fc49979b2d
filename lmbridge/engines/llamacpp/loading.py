"""Loads llama.cpp's server and reads its properties.

Rule: runs on the engine's worker thread.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from lmbridge.engines.llamacpp import library
from lmbridge.engines.llamacpp.header import Header, read_header
from lmbridge.engines.llamacpp.options import LlamaCppOptions, fill
from lmbridge.errors import EngineStartError

_SILENT, _ERRORS = -1, 1  # of llama.cpp's levels of what it prints
_CHUNK = 1 << 24  # bytes
_PATIENCE = 30.0  # seconds for the server to report its properties


@dataclass
class Model:
    """A loaded model.

    Attributes:
        server: xllamacpp's; many threads may call its methods at once, which block. None once the model is to be freed
            as soon as no thread is in one.
        task: its task.
        room: the most tokens of one request.
        knows_tools: its chat template describes tools.
    """

    server: Any
    header: Header
    task: str
    room: int
    knows_tools: bool


def load(options: LlamaCppOptions) -> Model:
    """Load the model.

    Raises:
        MissingDependencyError: xllamacpp is missing, or has changed.
        ModelNotFoundError: the file is not a GGUF file.
        EngineStartError: llama.cpp cannot load it.
    """
    header = read_header(options.path)
    task = header.task if options.task == "auto" else options.task
    xllamacpp = library.import_library()
    params = xllamacpp.CommonParams()
    _read_ahead(options.path)
    key = fill(params, options, header, task, xllamacpp.llama_pooling_type)
    try:
        server = _server(xllamacpp.Server, params)
    except (RuntimeError, ValueError) as cause:
        raise EngineStartError(
            f"llama.cpp cannot load {options.path} as a model to {task} ({cause}). Its output above says why; an "
            f"unknown architecture ({header.architecture}) may need a newer xllamacpp."
        ) from cause
    said = _properties(server.listening_address, key)
    library.refuse([path for path in library.PROPERTIES if _at(said, path) is None])
    room = _at(said, "default_generation_settings.n_ctx")
    return Model(server, header, task, int(room), bool(_at(said, "chat_template_caps.supports_tools")))


def _read_ahead(path: str) -> None:
    """Read the file into memory before llama.cpp loads it: xllamacpp holds the GIL while loading, and stops all of
    Python.

    What is left is the work, without waiting for the disk.
    """
    chunk = bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(chunk):
            pass


def _server(build: Any, params: Any) -> Any:
    """llama.cpp's server; if it cannot be built, build it once more with errors printed.

    That level also prints refused requests, so it is not the default.
    """
    try:
        params.verbosity = _SILENT
        return build(params)
    except (RuntimeError, ValueError):
        params.verbosity = _ERRORS
        return build(params)


def _properties(address: str, key: str) -> Any:
    """The properties that the server offers only over HTTP; any proxy in the environment is bypassed."""
    asking = urllib.request.Request(f"{address}/props", headers={"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asking, timeout=_PATIENCE) as answer:
        return json.load(answer)


def _at(found: Any, path: str) -> Any:
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
