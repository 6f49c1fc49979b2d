"""What the commands share: errors as one line, the model's options, and the display while a model loads.

Rule: standard library only at import; rich is imported where something is drawn.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lmbridge.errors import LMBridgeError

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

MODEL_HELP = "a folder, a .gguf file, a hub id, a server's URL, or demo, the bundled model (the default)"
DEBUG = "LMBRIDGE_TRACEBACK"  # the environment variable that lets errors through with their traceback


# --- errors ---


def guarded(command: Callable[[], int]) -> int:
    """Run ``command``; what it raises becomes one line on stderr and status 1, Ctrl-C status 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model may say what the terminal's encoding cannot
            stream.reconfigure(errors="replace")
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        complain(error if isinstance(error, LMBridgeError) else f"{error!r} ({DEBUG}=1 shows where)")
        return 1


def complain(problem: object) -> None:
    """Say what went wrong, as one line on stderr."""
    print(f"lmbridge: {one_line(problem)}", file=sys.stderr, flush=True)


def one_line(text: object) -> str:
    """``text`` without its line ends and other runs of blanks."""
    return " ".join(str(text).split())


def quiet_libraries() -> None:
    """Keep what libraries log and warn out of the display; what matters reaches the user as an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("lmbridge").addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _Notes(logging.Handler):
    """Shows what loading has to say; ``sys.stderr`` is looked up each time, since the spinner replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def show_notes() -> None:
    """Show what loading has to say, as lines on stderr: that a hub is asked, that a model runs the slow way."""
    notes = logging.getLogger("lmbridge.loading")
    notes.setLevel(logging.INFO)
    if not notes.handlers:
        notes.addHandler(_Notes())


# --- the model ---


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which engine runs the model, and how."""
    parser.add_argument(
        "--engine",
        default="auto",
        help="what runs it, as `lmbridge doctor` lists them (default: auto, which goes by what the model is)",
    )
    parser.add_argument(
        "--option",
        dest="options",
        metavar="NAME=VALUE",
        type=engine_option,
        action="append",
        default=[],
        help="an option of the engine, such as device=cpu; may be given again",
    )


def engine_option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` as its parts; the value is a Python literal, or a plain word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a plain word: device=cpu
        return name, value


@contextlib.contextmanager
def loaded(arguments: argparse.Namespace, *, quiet: bool = False) -> Iterator[Bridge]:
    """A bridge to the model that the arguments name, loaded under a progress display; closed at the end.

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
    with _leaving_by_ctrl_c():
        if sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would overwrite the spinner
            with spinner(f"Loading the model {model}"):
                bridge.start()
        else:
            bridge.start()
    if not quiet:
        print(f"The model {model} is loaded ({time.monotonic() - began:.1f} s).", flush=True)


@contextlib.contextmanager
def _leaving_by_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C end the process at once, by a handler that raises nothing.

    The engine's thread may be inside torch's import or reading weights. Nothing can end it there, and the interpreter's
    own end would wait for it, or crash under it. And a KeyboardInterrupt that strikes in a finalizer or in a weak
    reference's callback is printed and lost: the command would go on to its end, and report success.
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
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\r\x1b[2K\x1b[?25h")  # the spinner's line away, and the cursor back
    os._exit(130)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield
