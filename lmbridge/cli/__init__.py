# PYTHON_ARGCOMPLETE_OK
"""The command ``lmbridge``: one module or package per subcommand.

Rule: importing this package loads neither torch, transformers, flask nor rich; a command imports what it
needs when it runs. A command has ``SUMMARY``, ``USAGE``, ``EXAMPLES``, ``add_arguments(parser)`` and
``run(arguments)``, which returns the exit status or raises; its docstring is the text of its ``--help``.
``COMMANDS`` lists it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Protocol

import lmbridge
from lmbridge.cli import bench, chat, demo, doctor, run, serve
from lmbridge.cli.parser import Parser, UsageError, complete
from lmbridge.cli.terminal import guarded
from lmbridge.cli.values import did_you_mean


class Command(Protocol):
    """The interface of a command's module."""

    SUMMARY: str
    USAGE: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, arguments: argparse.Namespace, /) -> int: ...


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "run": run,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit status.

    0: success; 1: failure, explained in one line on stderr; 2: invalid command line; 130: Ctrl-C.
    Without a command, print the help and return 2: a script that omits the command should fail.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    complete(parser)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(f"unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)}")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        arguments.parser.refuse(unknown[0])
    if "command" not in arguments:
        parser.print_help()
        return 2
    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    command: Command = arguments.command
    try:
        return command.run(arguments)
    except UsageError as error:
        parser: Parser = arguments.parser
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = Parser(
        prog="lmbridge",
        usage="lmbridge COMMAND ...",
        description="Share one LLM engine among many threads: watch it, chat with it, serve it.",
        epilog="examples:\n"
        "  lmbridge demo                 the bundled model; no download\n"
        "  lmbridge chat ./my-model      a model in a folder\n"
        "  lmbridge serve ./my-model     the same model for OpenAI clients and browsers\n"
        "\nTab completion in bash:\n"
        '  pip install argcomplete && eval "$(register-python-argcomplete lmbridge)"\n'
        "\nRun `lmbridge COMMAND --help` for more about a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lmbridge {lmbridge.__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="lmbridge")
    for name, command in COMMANDS.items():
        part = commands.add_parser(
            name,
            help=command.SUMMARY,
            usage=f"lmbridge {name} {command.USAGE}",
            description=command.__doc__,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(part)
        part.set_defaults(command=command, parser=part)
    return parser
