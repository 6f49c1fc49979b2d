"""Run a script written for LMDeploy, unchanged.

In the script, `from lmdeploy import pipeline, ...` imports lmbridge's drop-in
replacement, whether or not LMDeploy is installed. Otherwise it runs as with
`python SCRIPT`. Arguments after SCRIPT go to the script.
"""

from __future__ import annotations

import argparse

from lmbridge.cli.model import add_engine_argument
from lmbridge.cli.terminal import complain

SUMMARY = "run a script written for LMDeploy"
USAGE = "[OPTION ...] SCRIPT [ARGUMENT ...]"
EXAMPLES = """\
  lmbridge run script.py --its-own-option
  lmbridge run --model demo script.py       with the bundled model instead
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_argument(
        parser,
        "the engine that runs the script's models; `lmbridge doctor` lists engines (default: lmdeploy; transformers "
        "for demo)",
        default=None,
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="load this instead of the script's model: a folder, a Hugging Face id, or demo",
    )
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
