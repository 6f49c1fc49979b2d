"""Shared by the commands: one-line errors, quiet libraries, and a spinner.

Rule: standard library only at import; rich is imported where it draws.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from lmbridge.cli.faults import in_words
from lmbridge.errors import LMBridgeError

MOST = 2000  # characters of a line about a problem; what a server answers, or somebody pastes, may be a file
DEBUG = "LMBRIDGE_TRACEBACK"  # the environment variable that shows the tracebacks of errors


def guarded(command: Callable[[], int]) -> int:
    """Run ``command``; an exception becomes one line on stderr and status 1, Ctrl-C status 130."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the terminal's encoding may lack characters that a model writes
            stream.reconfigure(errors="replace")
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        known = isinstance(error, (LMBridgeError, OSError))
        complain(in_words(error) if known else f"unexpected error: {error!r} (set {DEBUG}=1 for the traceback)")
        return 1


def _open_closed_streams() -> None:
    """Open as empty what the shell has closed (``2>&-``): it is None then, and input() needs even stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (open until the end)


def complain(problem: object) -> None:
    """Print a problem as one line on stderr."""
    print(f"lmbridge: {one_line(problem)}", file=sys.stderr, flush=True)


def one_line(text: object, most: int = MOST) -> str:
    """``text`` on one line that may go to a terminal, cut after ``most`` characters."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= most else f"{line[:most]} …"


_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: "\N{REPLACEMENT CHARACTER}" for code in _CONTROLS if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """``text`` without the characters that drive a terminal: its title, its clipboard, its screen."""
    return text.translate(_SHOWN)


def is_terminal(*streams: TextIO) -> bool:
    """Whether all of these are terminals."""
    return all(stream.isatty() for stream in streams)


def program() -> str:
    """What the user types to run lmbridge: its name, or its path if the shell cannot find it by name."""
    typed = sys.argv[0]
    if os.path.basename(typed) != "lmbridge":
        return "python -m lmbridge"
    found = shutil.which("lmbridge")
    return "lmbridge" if found and os.path.realpath(found) == os.path.realpath(typed) else typed


def quiet_libraries() -> None:
    """Keep libraries' logs, warnings and progress bars off the terminal; what matters reaches the user as an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars would overwrite the spinner, and fill a log
    logging.getLogger("lmbridge").addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class LogFormatter(logging.Formatter):
    """Formats log records, which may quote what clients and other servers sent."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Notes(logging.Handler):
    """Prints log records of loading; looks up ``sys.stderr`` each time, since the spinner replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def show_notes() -> None:
    """Print log records of loading as lines on stderr, such as a download or a slow fallback."""
    notes = logging.getLogger("lmbridge.loading")
    notes.setLevel(logging.INFO)
    if not notes.handlers:
        notes.addHandler(_Notes())


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner on stderr if that is a terminal."""
    if not is_terminal(sys.stderr):
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would overwrite the spinner
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield
