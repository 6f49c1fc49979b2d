"""The command ``lmbridge``: one module per subcommand.

Rule: importing this package loads neither torch, transformers, flask nor rich; a command imports what it
needs when it runs. A command is a module with ``SUMMARY``, ``add_arguments(parser)`` and ``run(arguments)``,
which gives the exit status or raises; its docstring is the text of its ``--help``. ``COMMANDS`` lists it.
"""

from __future__ import annotations

import argparse
from typing import NoReturn, Protocol

import lmbridge
from lmbridge.cli import bench, chat, demo, doctor, run, serve
from lmbridge.cli.terminal import guarded


class Command(Protocol):
    """What a command's module offers."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, arguments: argparse.Namespace, /) -> int: ...


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "chat": chat,
    "bench": bench,
    "run": run,
    "serve": serve,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit status.

    0: it worked; 1: it did not, and one line on stderr says why; 2: the command line is wrong; 130: Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    command: Command = arguments.command
    return guarded(lambda: command.run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, every command's own part included."""
    parser = _Parser(
        prog="lmbridge",
        description="Many threads, one LLM engine: see it work, and talk to a model.",
        epilog="`lmbridge COMMAND --help` says more about each command.",
    )
    parser.add_argument("--version", action="version", version=f"lmbridge {lmbridge.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)
    for name, command in COMMANDS.items():
        part = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(part)
        part.set_defaults(command=command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lmbridge: {message} (see `{self.prog} --help`)\n")
