"""The model that a command runs: its command-line arguments, and loading it with a spinner.

Rule: standard library only at import.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmbridge.cli import values
from lmbridge.cli.terminal import is_terminal, quiet_libraries, show_notes, spinner

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

MODEL_HELP = "a folder, a .gguf file, a Hugging Face id, a server's URL, or demo (the bundled model)"


def add_model_arguments(
    parser: argparse.ArgumentParser, dest: str = "model", default: str | None = "demo", note: str = "(default: demo)"
) -> argparse._ArgumentGroup:
    """Add the arguments for the model, its engine and options; return their group for further ones."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        dest, metavar="MODEL", type=values.filled, nargs="?", default=default, help=f"{MODEL_HELP} {note}"
    )
    add_engine_argument(
        group, "the engine that runs it; `lmbridge doctor` lists engines (default: auto, which suits the model)"
    )
    group.add_argument(
        "--option",
        dest="options",
        metavar="NAME=VALUE",
        type=values.option,
        action="append",
        default=[],
        help="an option of the engine, such as device=cpu; may be repeated",
    )
    return group


def add_engine_argument(
    group: argparse.ArgumentParser | argparse._ArgumentGroup, text: str, default: str | None = "auto"
) -> None:
    action = group.add_argument("--engine", metavar="NAME", type=values.engine, default=default, help=text)
    action.completer = _engines  # type: ignore[attr-defined]  # argcomplete asks for it


def _engines(**_: object) -> list[str]:
    from lmbridge.engines import engine_names

    return engine_names()


@contextlib.contextmanager
def loaded(arguments: argparse.Namespace, *, quiet: bool = False) -> Iterator[Bridge]:
    """Load the model that the arguments name, with a spinner; yield its bridge, and close it at the end.

    Args:
        arguments: with ``model``, ``engine`` and ``options``.
        quiet: show nothing unless stderr is a terminal.
    """
    from lmbridge.bridge import Bridge

    quiet_libraries()
    show_notes()
    bridge = Bridge(arguments.model, engine=arguments.engine, **dict(arguments.options))
    try:
        _load(bridge, str(arguments.model), quiet)
        yield bridge
    finally:
        bridge.close()


def _load(bridge: Bridge, model: str, quiet: bool) -> None:
    began = time.monotonic()
    with _leaving_by_ctrl_c(), spinner(f"Loading the model {model}"):
        bridge.start()
    if not quiet:
        print(f"Loaded the model {model} in {time.monotonic() - began:.1f} s.", flush=True)


@contextlib.contextmanager
def _leaving_by_ctrl_c() -> Iterator[None]:
    """Make Ctrl-C end the process at once, by a handler that raises nothing.

    The engine's thread may be importing torch or reading weights. Nothing can stop it there, and an orderly exit of the
    interpreter would wait for it, or crash. Also, a KeyboardInterrupt raised in a finalizer or in a weak reference's
    callback is printed and lost: the command would run to its end and report success.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(signal_number: int, frame: object) -> None:
    if is_terminal(sys.stderr):
        os.write(sys.stderr.fileno(), b"\r\x1b[2K\x1b[?25h")  # clear the spinner's line and show the cursor
    os._exit(130)
