"""What it costs to read a remote model's streams through a bridge, beside the official client in each thread.

The server is lmbridge's own in another process, over an engine that makes one token for each request and step. Ways, in
turn:

- direct: each thread reads a stream of one ``openai.OpenAI`` client that all share
- bridge: each thread reads ``bridge.stream`` over the engine ``openai``, whose client is on the bridge's loop

Tokens a second, CPU microseconds of this process for each token, and the median time from the start of all threads to
the first token of one.

Run: ``python -m tests.benchmarks.remote_cost [--threads 64] [--tokens 100] [--step-ms 20] [--rounds 5]``
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from lmbridge import Bridge
from lmbridge.flask.http_server import HttpServer
from lmbridge.flask.serving import create_app
from lmbridge.testing import ScriptedEngine
from tests.benchmarks.measure import interleave, print_table

Read = Callable[[], Iterator[str]]


@dataclass
class Result:
    """One round of one way."""

    tokens_per_s: float
    cpu_us_per_token: float
    first_token_ms: float


def be_server(tokens: int, step: float) -> None:
    """Serve until this process is told to end."""
    engine = ScriptedEngine(lambda request: ["token "] * tokens, step_time=step, max_batch_size=1000)
    with Bridge(engine) as bridge:
        server = HttpServer(create_app({"LMBRIDGE_MODELS": {"m": bridge}}, page=False), "127.0.0.1", 0, 300, 1 << 20)
        server.open()
        print(server.url, flush=True)
        signal.sigwait({signal.SIGTERM})
        server.close()


@contextlib.contextmanager
def served(tokens: int, step: float) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.benchmarks.remote_cost", "--be-server"]
    command += ["--tokens", str(tokens), "--step-ms", str(step * 1000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"{process.stdout.readline().strip()}/v1"
        finally:
            process.terminate()


def measure(read: Read, threads: int) -> Result:
    """So many threads at once, each through one stream."""
    firsts: list[float] = []
    counts: list[int] = []

    def run() -> None:
        count = 0
        for _ in read():
            if not count:
                firsts.append(time.perf_counter() - began)
            count += 1
        counts.append(count)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    began, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall, cpu, tokens = time.perf_counter() - began, time.process_time() - cpu, threads * arguments.tokens
    assert len(counts) == threads
    return Result(tokens / wall, cpu / tokens * 1e6, statistics.median(firsts) * 1000)


def direct(client: OpenAI) -> Iterator[str]:
    messages: Any = [{"role": "user", "content": "hello"}]
    options: Any = {"model": "m", "messages": messages, "max_tokens": arguments.tokens + 1, "stream": True}
    for chunk in client.chat.completions.create(**options):
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def bridged(bridge: Bridge) -> Iterator[str]:
    for delta in bridge.stream("hello", max_new_tokens=arguments.tokens + 1):
        if delta.text:
            yield delta.text


def main() -> None:
    if arguments.be_server:
        return be_server(arguments.tokens, arguments.step_ms / 1000)
    with (
        served(arguments.tokens, arguments.step_ms / 1000) as url,
        OpenAI(base_url=url, api_key="none") as client,
        Bridge(url, max_batch_size=256) as bridge,
    ):
        ways = {
            "direct": lambda: measure(lambda: direct(client), arguments.threads),
            "bridge": lambda: measure(lambda: bridged(bridge), arguments.threads),
        }
        interleave(ways, 1)  # connections are made, and code is loaded
        title = f"{arguments.threads} threads, a token each {arguments.step_ms:g} ms"
        print_table(title, interleave(ways, arguments.rounds), "direct")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--be-server", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    main()
