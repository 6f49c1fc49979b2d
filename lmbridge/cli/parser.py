"""How the command line is read: mistakes in one line that names the right help, and completion in the shell.

Rule: standard library only at import; knows no command by name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from typing import NoReturn

from lmbridge.cli.values import did_you_mean


class UsageError(Exception):
    """Arguments that are right by themselves contradict each other. Told as the parser's own errors are."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, and where to read more."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required:", "missing:")
        self.exit(2, f"lmbridge: {message} (see `{self.prog} --help`)\n")

    def refuse(self, unknown: str) -> NoReturn:
        """End the command because of a word that it does not know."""
        name = unknown.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{unknown!r} is one argument too many")
        if name == "--model":
            self.error(f"the model is named without an option: `{self.prog} MODEL`")
        self.error(f"there is no option {name}{did_you_mean(name, self._options())}")

    def _options(self) -> list[str]:
        """The long names of all options, where the help begins a line with them."""
        lines: list[str] = re.findall(r"(?m)^  (-\S.*?)(?:  |$)", self.format_help())
        return re.findall(r"--[\w-]+", " ".join(lines))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how the line may go on, and exit: by argcomplete, where that is installed."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            importlib.import_module("argcomplete").autocomplete(parser)
        except ImportError:
            parser.exit(1)  # nothing may run while a line is typed
