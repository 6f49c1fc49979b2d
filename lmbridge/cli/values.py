"""Parses and checks the values of options.

Rule: each function is an ``argparse`` type: it returns the value, or raises an error that says what is expected.
Standard library only at import.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

MOST = 2**63 - 1  # the largest integer that engines accept


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` with the known name closest to ``text``, or an empty string."""
    if len(text) > 100:  # comparing takes time in proportion to its square
        return ""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(text.lower(), by_lower, 1, 0.6)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def count(text: str) -> int:
    return _whole(text, 0, MOST)


def positive(text: str) -> int:
    return _whole(text, 1, MOST)


def port(text: str) -> int:
    return _whole(text, 0, 65535)


def between(least: int, most: int = MOST) -> Callable[[str], int]:
    """An ``argparse`` type for integers within these limits."""
    return functools.partial(_whole, least=least, most=most)


def _whole(text: str, least: int, most: int) -> int:
    if text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    limits = f"of at least {least}" if most == MOST else f"from {least} to {most}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")


def number(text: str) -> float:
    """0 or more."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)) and float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def more_than_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)) and float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def share(text: str) -> float:
    """Above 0, up to 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")


def filled(value: str) -> str:
    """Anything but whitespace."""
    if value.strip():
        return value
    raise argparse.ArgumentTypeError("must not be empty")


def engine(name: str) -> str:
    from lmbridge.engines import engine_names
    from lmbridge.engines.auto import AUTO

    names = [AUTO, *engine_names()]
    if name in names:
        return name
    hint = did_you_mean(name, names) or f"; choose from {', '.join(names)}"
    raise argparse.ArgumentTypeError(f"unknown engine {name!r}{hint}")


def option(text: str) -> tuple[str, Any]:
    """Split ``NAME=VALUE``; the value is a Python literal, or a plain word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # a plain word: device=cpu
        return name, value


def new_file(path: str) -> str:
    """Check a file's path before the work starts: nobody wants to learn at the end that it cannot be written."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path!r} is a folder; give a file")
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: there is no folder {folder}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: no permission")
    return path


def host_name(text: str) -> str:
    from lmbridge.flask.hosts import allowed_name

    try:
        return allowed_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
