"""Measure a model or a server under load.

Each client is a thread that sends a prompt, reads the answer and sends the next
prompt. With --rate, requests arrive at random times instead, and the wait for a
free client counts. Prompts are random words, all different; the same --seed
makes the same prompts.

The bridge's share is the cost of the bridge itself: in alternate rounds, the
same load goes directly to the engine on its own loop, without crossing threads.
The share is 1 - tokens/s through the bridge / tokens/s without it.

Ctrl-C stops the load and reports the requests that had ended by then. The exit
status is 1 if every request failed, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmbridge.cli import values
from lmbridge.cli.bench.bridge import BridgeTarget, Native, engine_of
from lmbridge.cli.bench.load import Round, Target, poisson
from lmbridge.cli.bench.plot import check_matplotlib, draw
from lmbridge.cli.bench.prompts import Prompts
from lmbridge.cli.bench.report import Result, as_json, as_text, summarize
from lmbridge.cli.bench.url import UrlTarget, find_model, open_client
from lmbridge.cli.faults import in_words
from lmbridge.cli.model import add_model_arguments, loaded
from lmbridge.cli.parser import UsageError
from lmbridge.cli.terminal import is_terminal, printable
from lmbridge.engines.auto import is_url
from lmbridge.errors import EngineError, LMBridgeError
from lmbridge.messages import GenerationConfig

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

SUMMARY = "measure a model or a server under load"
USAGE = "[OPTION ...] [MODEL | --url URL]"
EXAMPLES = """\
  lmbridge bench                            the bundled model, in this process
  lmbridge bench ./my-model --clients 16 --json figures.json
  lmbridge bench --url http://localhost:8000/v1 --rate 10 --requests 200
"""
REQUESTS_PER_CLIENT = 4
MOST_CONNECTIONS = 1000  # of one HTTP client; more clients would wait for a connection
HIDDEN = ("api_key", "command", "parser", "json", "plot", "usual_engine")
"""Arguments left out of the report: secrets, and those that do not affect the measurement."""

Advance = Callable[[int], None]


# --- the command line ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dest="target", default=None)
    parser.set_defaults(usual_engine=parser.get_default("engine"))
    server = parser.add_argument_group("a server instead of a model")
    server.add_argument("--url", help="its base URL, which usually ends in /v1")
    server.add_argument("--model", metavar="NAME", help="which of the server's models to use (default: its only one)")
    server.add_argument("--api-key", metavar="KEY", help="the server's API key (default: $OPENAI_API_KEY)")
    _add_load_arguments(parser.add_argument_group("the load"))
    output = parser.add_argument_group("the report")
    output.add_argument("--json", metavar="FILE", type=values.new_file, help="write all figures and every request")
    output.add_argument("--plot", metavar="FILE", type=values.new_file, help="plot the latencies, as a PNG")
    output.add_argument("--no-native", action="store_true", help="do not measure the bridge's share")


def _add_load_arguments(load: argparse._ArgumentGroup) -> None:
    add = load.add_argument
    add("--clients", metavar="N", type=values.positive, default=64, help="client threads (default: 64)")
    add("--requests", metavar="N", type=values.positive, help="total requests (default: 4 per client)")
    add(
        "--rate",
        metavar="R",
        type=values.more_than_zero,
        help="arriving requests per second (default: each client sends when it is free)",
    )
    add(
        "--prompt-tokens",
        metavar="N",
        type=values.positive,
        default=128,
        help="approximate prompt length in tokens (default: 128)",
    )
    add(
        "--shared-prefix",
        metavar="N",
        type=values.count,
        default=0,
        help="how many of those tokens all prompts share (default: 0)",
    )
    add("--max-new-tokens", metavar="N", type=values.positive, default=64, help="tokens per answer (default: 64)")
    add("--stop-at-eos", action="store_true", help="let answers end early, at the model's end-of-sequence token")
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="stream answers (default: yes)")
    add("--warmup", metavar="N", type=values.count, help="warm-up requests, not counted (default: one per client)")
    add(
        "--timeout",
        metavar="SECONDS",
        type=values.more_than_zero,
        default=600.0,
        help="the timeout of a request (default: 600)",
    )
    add("--seed", metavar="N", type=values.count, default=0, help="seed of prompts and arrival times (default: 0)")


def check(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options; raise UsageError if options contradict each other."""
    if arguments.requests is None:
        arguments.requests = REQUESTS_PER_CLIENT * arguments.clients
    if arguments.warmup is None:
        arguments.warmup = min(arguments.clients, arguments.requests)
    if arguments.shared_prefix > arguments.prompt_tokens:
        raise UsageError("--shared-prefix cannot exceed --prompt-tokens")
    if arguments.url is None:
        why = "is for a server and needs --url; for a model in this process, type `lmbridge bench MODEL`"
        _refuse(arguments, ("model", "api_key"), why)
        arguments.target = arguments.target or "demo"
        return
    arguments.engine = None if arguments.engine == arguments.usual_engine else arguments.engine
    _refuse(arguments, ("target", "engine", "options"), "is for a model in this process, and cannot be used with --url")
    if arguments.clients > MOST_CONNECTIONS:
        raise UsageError(f"--clients cannot exceed {MOST_CONNECTIONS} with --url")
    if not is_url(arguments.url):
        raise UsageError(f"--url must begin with http:// or https://, unlike {arguments.url!r}")


def _refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    shown = {"target": "MODEL", "options": "--option"}
    for name in names:
        if getattr(arguments, name):
            raise UsageError(f"{shown.get(name) or '--' + name.replace('_', '-')} {why}")


# --- the run ---


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    if arguments.plot:
        check_matplotlib()
    if arguments.url:
        return bench_url(arguments)
    arguments.model = arguments.target
    with loaded(arguments) as bridge:
        return bench_bridge(bridge, arguments)


def bench_url(arguments: argparse.Namespace) -> int:
    """Run the whole command against a server."""
    with open_client(arguments.url, arguments.api_key, arguments.timeout) as client:
        model = arguments.model or find_model(client, arguments.url)
        target = UrlTarget(client, model, arguments.max_new_tokens, arguments.stream)
        prompts = Prompts(arguments.prompt_tokens, arguments.shared_prefix, arguments.seed, count=None)
        result = new_result(arguments, f"{model} at {arguments.url}", ignore_eos=False, prompts_by="words")
        result.no_share = "cannot be measured from outside a server"
        return Bench(arguments, target, prompts, result).run()


def bench_bridge(bridge: Bridge, arguments: argparse.Namespace) -> int:
    """Run the whole command on a ready bridge."""
    engine, _ = engine_of(bridge)
    ignore_eos = not arguments.stop_at_eos and "ignore_eos" in engine.supports
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens, ignore_eos=ignore_eos)
    target = BridgeTarget(bridge, config, arguments.timeout, arguments.stream)
    prompts = Prompts(arguments.prompt_tokens, arguments.shared_prefix, arguments.seed, target.count_tokens)
    result = new_result(arguments, engine.describe(), ignore_eos, prompts_by="tokens")
    result.max_batch_size = engine.max_batch_size
    native: Native | None = Native(bridge, config, arguments.clients)
    if arguments.rate:
        native, result.no_share = None, "--rate limits the tokens per second"
    elif arguments.no_native:
        native, result.no_share = None, "--no-native"
    return Bench(arguments, target, prompts, result, native, bridge.stats).run()


def new_result(arguments: argparse.Namespace, label: str, ignore_eos: bool, prompts_by: str) -> Result:
    settings = {name: value for name, value in vars(arguments).items() if name not in HIDDEN}
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings["options"] = dict(arguments.options)
    return Result({**settings, "ignore_eos": ignore_eos, "prompts_by": prompts_by}, label, began)


class Bench:
    """One run: warm-up, measurement, report."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        target: Target,
        prompts: Prompts,
        result: Result,
        native: Native | None = None,
        stats: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._arguments = arguments
        self._target = target
        self._prompts = prompts
        self._result = result
        self._native = native
        self._stats = stats

    def run(self) -> int:
        """Measure and report; return the exit status."""
        arguments, result = self._arguments, self._result
        try:
            with progress(arguments.warmup + arguments.requests * (2 if self._native else 1)) as advance:
                self._warm_up(advance)
                self._measure(advance)
        except KeyboardInterrupt:
            result.interrupted = True
        if result.interrupted:
            result.no_share = result.no_share or "interrupted"
        if result.interrupted and not result.ended:
            print("Interrupted before the first request ended; nothing was measured.")
            return 130
        summary = summarize(result)
        print(printable(as_text(result, summary)), flush=True)
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(as_json(result, summary), file, indent=1, default=str)  # an option may be anything
        if arguments.plot:
            draw(result, arguments.plot)
        return 130 if result.interrupted else int(result.all_failed)

    def _warm_up(self, advance: Advance) -> None:
        """Send uncounted requests, so that one-time costs are not measured.

        Raises:
            EngineError: all of them failed, as the others would.
        """
        count = self._arguments.warmup
        if not count:
            return
        first = Round(self._target, self._prompts.make(count), self._arguments.clients)
        with contextlib.closing(first):
            first.run(lambda: advance(1))
        errors = [row for row in first.rows if row.outcome == "error"]
        if len(errors) == count:
            raise EngineError(f"Every warm-up request failed: {errors[0].error}: {errors[0].message}")

    def _measure(self, advance: Advance) -> None:
        """Measure the bridge, and the engine alone for comparison: bridge, engine, engine, bridge, half the requests
        each time, so that neither profits from coming later. One full round each if halves would leave clients idle."""
        requests, clients = self._arguments.requests, self._arguments.clients
        if self._native is None:
            self._bridge_round(requests, advance)
            return
        half = requests if requests < 2 * clients else (requests + 1) // 2
        self._bridge_round(half, advance)
        self._native_round(half, advance)
        if requests > half:
            self._native_round(requests - half, advance)
            self._bridge_round(requests - half, advance)

    def _bridge_round(self, count: int, advance: Advance) -> None:
        rate, seed = self._arguments.rate, self._arguments.seed
        arrivals = list(itertools.islice(poisson(rate, seed), count)) if rate else None
        number = len(self._result.rounds) + 1
        part = Round(self._target, self._prompts.make(count), self._arguments.clients, arrivals, number)
        self._result.rounds.append(part)
        before = self._stats()
        with contextlib.closing(part):
            try:
                part.run(lambda: advance(1))
            finally:
                self._count_steps(before, self._stats())

    def _native_round(self, count: int, advance: Advance) -> None:
        if self._native is not None:
            try:
                self._result.natives.append(self._native.run(self._prompts.make(count)))
            except LMBridgeError as error:  # the bridge's own figures are still valid
                self._result.no_share, self._native = in_words(error), None
        advance(count)

    def _count_steps(self, before: dict[str, float], after: dict[str, float]) -> None:
        result = self._result
        if {"steps", "tokens"} <= before.keys() & after.keys():
            result.steps = (result.steps or 0.0) + after["steps"] - before["steps"]
            result.engine_tokens = (result.engine_tokens or 0.0) + after["tokens"] - before["tokens"]


@contextlib.contextmanager
def progress(requests: int) -> Iterator[Advance]:
    """Show a progress bar while the context lasts, if stderr is a terminal. Drawn rarely: drawing takes the GIL."""
    if not is_terminal(sys.stderr):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task: Any = bar.add_task("Measuring", total=requests)
        yield lambda count: bar.update(task, advance=count)
