"""``python -m lmbridge.testing.storm --requests 1000000 --seed 1``.

Rule: reads the command line; the exit status is 0 only if no fault was found.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys

from lmbridge.testing.storm.storm import Storm


def main(arguments: list[str] | None = None) -> int:
    """Run a storm; prints progress and, as the last line, the faults found."""
    parser = argparse.ArgumentParser(prog="python -m lmbridge.testing.storm", description=main.__doc__)
    parser.add_argument("--requests", type=_positive, default=20_000, help="requests in total (default: 20000)")
    parser.add_argument("--seed", type=int, help="random seed (default: a new one each time)")
    parser.add_argument("--threads", type=_positive, default=64, help="calling threads (default: 64)")
    parser.add_argument("--loops", type=int, default=8, help="calling event loops (default: 8)")
    parser.add_argument("--log", action="store_true", help="show lmbridge's own log, which reports each fault")
    options = parser.parse_args(arguments)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    if not options.log:
        for name in ("lmbridge", "concurrent.futures", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return Storm(options.requests, seed, options.threads, max(0, options.loops), _say).run()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one piece, whichever thread says it
    sys.stdout.flush()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
