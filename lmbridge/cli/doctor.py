"""Show which engines can run here, and what the others need.

Without MODEL, show the machine and every engine: the installed versions, the
tested versions, and the command that installs what is missing. With MODEL, load
that model and say which engine runs it, and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import lmbridge
from lmbridge.cli.model import add_model_arguments, loaded
from lmbridge.cli.terminal import one_line, printable
from lmbridge.device.sizes import in_words
from lmbridge.engines import engine_class, engine_names
from lmbridge.engines.base import Engine, Library
from lmbridge.generation import GenerationConfig

SUMMARY = "show which engines can run here, and what is missing"
USAGE = "[OPTION ...] [MODEL]"
EXAMPLES = """\
  lmbridge doctor
  lmbridge doctor ./my-model --try          load it and generate one token
"""
_INDENT = " " * 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, default=None, note="(default: none is loaded)")
    parser.add_argument("--try", dest="attempt", action="store_true", help="generate one token (default model: demo)")
    parser.add_argument("--all", action="store_true", help="with MODEL, also show the machine and the engines")


def run(arguments: argparse.Namespace) -> int:
    has_model = arguments.model is not None or arguments.attempt
    if has_model:
        _load(arguments)
    if arguments.all or not has_model:
        for line in (*([""] if has_model else []), *_machine(), "", *_engines()):
            print(line)
    return 0


# --- the machine ---


def _machine() -> Iterator[str]:
    yield f"lmbridge {lmbridge.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    yield f"{os.cpu_count()} processors, {_memory()}"
    yield from _devices()


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{in_words(memory.total)} of memory, {in_words(memory.available)} of it free"


def _devices() -> Iterator[str]:
    """The GPUs that torch sees."""
    if importlib.util.find_spec("torch") is None:
        yield "GPUs: unknown without torch (pip install torch)"
        return
    try:
        import torch
    except Exception as cause:
        yield f"GPUs: unknown, since torch cannot be imported: {one_line(cause)}"
        return
    if not torch.cuda.is_available():
        yield f"no GPU for torch {torch.__version__}"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield f"cuda:{number}: {name}, {in_words(total)} of memory, {in_words(free)} of it free"


# --- the engines ---


def _engines() -> Iterator[str]:
    for name in engine_names():
        try:
            yield from _engine(name, engine_class(name))
        except Exception as error:  # a broken package must not hide the other engines: readers of this have trouble
            yield f"{name:<13} broken: {one_line(error)}"


def _engine(name: str, engine: type[Engine]) -> Iterator[str]:
    found = {library: _version(library) for library in engine.libraries}
    missing = [library for library, version in found.items() if version is None]
    here = ", ".join(f"{library.package} {version} (tested: {library.tried})" for library, version in found.items())
    if not missing:
        yield f"{name:<13} ready{': ' if here else ''}{here}"
        return
    yield f"{name:<13} needs {', '.join(f'{library.package} (tested: {library.tried})' for library in missing)}"
    for command in dict.fromkeys(library.install for library in missing):
        yield f"{_INDENT}{command}"


def _version(library: Library) -> str | None:
    """The installed version; None if there is none."""
    for package in (library.package, *library.builds):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


# --- a model ---


def _load(arguments: argparse.Namespace) -> None:
    """Load the model, and print how it runs."""
    arguments.model = arguments.model or "demo"
    with loaded(arguments) as bridge:
        print(printable(f"Engine: {bridge.describe()}"))
        print(f"Tasks: {', '.join(sorted(bridge.tasks()))}")
        if arguments.attempt and "generate" in bridge.tasks():
            config = GenerationConfig(max_new_tokens=1) if "max_new_tokens" in bridge.supports() else None
            response = bridge.infer("Hello!", config, timeout=60)
            print(f"It generated {response.text!r} in {response.timings.total * 1000:.0f} ms.")
