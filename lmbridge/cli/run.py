"""Run a script that was written for LMDeploy, as it stands.

In it, `from lmdeploy import pipeline, ...` gives lmbridge's drop-in, whether
LMDeploy is installed or not. Otherwise it runs as under `python SCRIPT`.
"""

from __future__ import annotations

import argparse

from lmbridge.cli.terminal import complain
from lmbridge.engines import engine_names
from lmbridge.engines.auto import AUTO

SUMMARY = "run a script that was written for LMDeploy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        metavar="NAME",
        choices=[AUTO, *engine_names()],
        help="what runs the script's models, as `lmbridge doctor` lists them (default: lmdeploy, and for demo "
        "transformers)",
    )
    parser.add_argument("--model", help="loaded in place of the script's: a folder, a hub id, or demo")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(arguments: argparse.Namespace) -> int:
    from lmbridge.compat.lmdeploy.script import Script

    try:
        script = Script(arguments.script)
    except OSError as error:
        complain(f"cannot read {arguments.script}: {error.strerror}")
        return 2
    try:
        script.run(arguments.arguments, backend=arguments.engine, model=arguments.model)
    except SystemExit:
        raise
    except BaseException as error:
        script.show(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0
