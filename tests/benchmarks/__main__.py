"""The bridge's cost beside every other way there is, in one run: calls, calls beside a busy thread, streams, idleness,
memory, the bundled model, WSGI servers, the engine beside what else runs the same model, and a server elsewhere.

Run on a quiet machine: ``python -m tests.benchmarks [--rounds 5]`` (about an hour)
"""

from __future__ import annotations

import argparse
import subprocess
import sys

RUNS = [
    ["call_cost", "--threads", "1,64,256"],
    ["call_cost", "--threads", "1,64", "--busy", "--peers", "bridge,threadsafe,anyio portal,janus bell,bare"],
    ["stream_cost"],
    ["idle_cost"],
    ["main_job"],
    ["http_servers"],
    ["http_peers"],
    ["engine_speed", "--tokens", "100", "--candidates", "bridge,bridge-sdpa,manager,lock,static-8,static-32,serve"],
    ["sampler_cost"],
    ["long_prompt"],
    ["real_model", "--serve", "--profile"],
    ["device_turns"],
    ["remote_cost"],
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for module, *arguments in RUNS:  # each in a process of its own: what one leaves behind is not the next one's
        if module != "idle_cost":
            arguments += ["--rounds", str(rounds)]
        code = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
