"""Parses the command line: reports a usage error in one line that names the right help, and completes in the shell.

Rule: standard library only at import; knows no command by name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from typing import NoReturn

from lmbridge.cli.terminal import one_line
from lmbridge.cli.values import did_you_mean

MOST = 400  # characters of a message; what was typed by mistake may be a file


class UsageError(Exception):
    """Arguments that are valid by themselves contradict each other. Reported like the parser's own errors."""


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, and says where to read more."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required:", "missing:")
        self.exit(2, f"lmbridge: {one_line(message, MOST)} (see `{self.prog} --help`)\n")

    def refuse(self, unknown: str) -> NoReturn:
        """Exit with an error about an unknown argument."""
        name = unknown.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {unknown!r}")
        if name == "--model":
            self.error(f"give the model without --model: `{self.prog} MODEL`")
        self.error(f"unknown option {name}{did_you_mean(name, self._options())}")

    def _options(self) -> list[str]:
        """The long names of all options, read from the lines of the help that begin with them."""
        lines: list[str] = re.findall(r"(?m)^  (-\S.*?)(?:  |$)", self.format_help())
        return re.findall(r"--[\w-]+", " ".join(lines))


def complete(parser: argparse.ArgumentParser) -> None:
    """If the shell asks for completions, print them and exit; needs argcomplete."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            importlib.import_module("argcomplete").autocomplete(parser)
        except ImportError:
            parser.exit(1)  # never run the command itself during completion
