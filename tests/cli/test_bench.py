"""``lmbridge bench``: its figures add up, what failed is counted, and a server can be measured as well as a model."""

from __future__ import annotations

import _thread
import argparse
import itertools
import json
import signal
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Lock, Thread, main_thread
from typing import TYPE_CHECKING, Any

import pytest

from lmbridge import Bridge, EngineError, Request
from lmbridge.cli import bench, build_parser
from lmbridge.cli.bench.load import poisson
from lmbridge.cli.bench.prompts import Prompts
from lmbridge.cli.bench.report import Quantiles
from lmbridge.testing import ScriptedEngine, prompt_text

if TYPE_CHECKING:
    from tests.cli.conftest import Open, Run

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]
SPREADS = ("time_to_first_token", "inter_token_latency", "end_to_end_latency", "queue_time")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def ordered(spread: dict[str, float]) -> bool:
    return 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]


def split(line: str) -> list[str]:
    return line.split()


def parsed(*words: str) -> argparse.Namespace:
    """The command line ``lmbridge bench WORDS``, checked."""
    arguments = build_parser().parse_args(["bench", *words])
    bench.check(arguments)
    return arguments


# --- a model ---


@pytest.mark.long
def test_the_bundled_model(run: Run, tmp_path: Path) -> None:
    """Every figure is printed, the JSON file agrees with itself, and the picture can be opened."""
    as_json, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    load_words = split("--clients 6 --requests 13 --prompt-tokens 60 --max-new-tokens 8")
    done = run("bench", "demo", *load_words, "--json", str(as_json), "--plot", str(picture))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = [line.split("  ")[0] for line in done.stdout.splitlines()]
    for name in ("requests/s", "output tokens/s", "total tokens/s", "batch size", "errors", "the bridge's share"):
        assert name in lines
    for name in ("time to first token", "inter-token latency", "end-to-end latency", "queue time"):
        assert f"{name}, ms" in lines
    consistent(load(as_json), requests=13, new_tokens=8)
    readable(picture)


def consistent(content: dict[str, Any], requests: int, new_tokens: int) -> None:
    summary, rows = content["summary"], content["requests"]
    assert (content["schema"], content["schema_version"]) == ("lmbridge-bench", 1)
    assert len(rows) == summary["requests"] == summary["ok"] == requests
    assert (summary["failed"], summary["errors"], content["interrupted"]) == (0, {}, False)
    assert summary["completion_tokens"] == sum(row["completion_tokens"] for row in rows) == requests * new_tokens
    assert summary["finish_reasons"] == {"length": requests}
    assert all(ordered(summary[name]) for name in SPREADS)
    # tokens that a slow machine reads together have no time between them
    assert requests < summary["inter_token_latency"]["count"] <= requests * (new_tokens - 1)
    mean = summary["prompt_tokens"] / requests
    assert mean == pytest.approx(content["settings"]["prompt_tokens"], rel=0.2)
    assert 1 <= summary["batch_mean"] <= summary["batch_max"] <= content["settings"]["clients"]
    assert [part["requests"] for part in content["rounds"]] == [7, 6]
    assert [part["tokens"] for part in content["native_rounds"]] == [7 * new_tokens, 6 * new_tokens]
    share = 1 - summary["output_tokens_per_second"] / summary["native_tokens_per_second"]
    assert summary["bridge_share"] == pytest.approx(share)
    assert content["versions"]["transformers"]
    assert content["machine"]["cpus"]


def readable(picture: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] > 500
    assert pixels.min() < pixels.max()


def test_arrivals_at_a_rate(scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a rate requests are sent when they are due, the answers may end by themselves, and no share is made up."""

    def short_unless_told(request: Request) -> list[str]:
        return ["word"] * (100 if request.config.ignore_eos else 3)

    as_json = tmp_path / "bench.json"
    bridge, _ = scripted(ScriptedEngine(short_unless_told, step_time=0.001))
    words = split("--clients 2 --requests 6 --rate 40 --warmup 0 --max-new-tokens 6 --no-stream --stop-at-eos --json")
    assert bench.bench_bridge(bridge.start(), parsed(*words, str(as_json))) == 0
    content = load(as_json)
    rows, summary = sorted(content["requests"], key=lambda row: row["due"]), content["summary"]
    assert len(rows) == summary["ok"] == 6
    assert [row["due"] for row in rows] == [time for time, _ in zip(poisson(40, 0), rows, strict=False)]
    assert all(row["due"] <= row["sent"] for row in rows)
    assert all(0 < row["first_token"] < row["total"] for row in rows)
    assert summary["start_delay"]["count"] == 6
    assert summary["bridge_share"] is None
    assert (summary["completion_tokens"], summary["finish_reasons"]) == (18, {"stop": 6})
    out = capsys.readouterr().out
    assert "sent late by" in out
    assert "6 of 6 answers ended by themselves before --max-new-tokens" in out


def test_ctrl_c(terminal: Open, tmp_path: Path) -> None:
    """Ctrl-C in the middle shows and writes what was measured until then, and exits with 130."""
    as_json = tmp_path / "bench.json"
    words = split("--clients 8 --requests 2000 --warmup 0 --prompt-tokens 20 --max-new-tokens 9 --no-native")
    with terminal("bench", "demo", *words, "--json", str(as_json)) as command:
        command.read_until("Measuring")
        command.read_until("% 0:")  # the time that is left is known once some have been answered
        command.send("\x03")
        assert command.exit_status() == 130
        assert "Traceback" not in command.shown
        assert "They leave out the " in command.shown
    content = load(as_json)
    assert content["interrupted"]
    summary = content["summary"]
    assert summary["ok"] > 0
    assert summary["failed"] == 0
    assert summary["ok"] + summary["interrupted"] == len(content["requests"]) < 2000
    assert summary["completion_tokens"] == 9 * summary["ok"]
    agrees_with_itself(content)


def agrees_with_itself(content: dict[str, Any]) -> None:
    """Every figure is of the requests that ended within the time that was measured."""
    summary, ended = content["summary"], [row for row in content["requests"] if row["outcome"] != "interrupted"]
    seconds = summary["seconds"]
    assert summary["requests"] == len(ended) == sum(part["requests"] for part in content["rounds"])
    assert summary["interrupted"] == len(content["requests"]) - len(ended)
    assert summary["requests_per_second"] * seconds == pytest.approx(summary["ok"])
    assert summary["output_tokens_per_second"] * seconds == pytest.approx(summary["completion_tokens"])
    both = summary["prompt_tokens"] + summary["completion_tokens"]
    assert summary["total_tokens_per_second"] * seconds == pytest.approx(both)
    assert all(spread["count"] <= len(ended) for name in SPREADS[2:] if (spread := summary[name]))
    assert all(row["due"] + row["total"] <= seconds for row in content["requests"])


def test_what_was_on_its_way(scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-C half an answer is in no figure: rates would otherwise count tokens of answers that are not there."""

    def two_end(request: Request) -> list[str]:
        if prompt_text(request.prompt).startswith(("1:", "2:", "3:", "4:")):  # the first two were made to count tokens
            return ["word"] * 3
        if next(others) == 3:
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        return ["word"] * 1_000_000

    others = itertools.count(1)
    as_json = tmp_path / "bench.json"
    bridge, engine = scripted(ScriptedEngine(two_end, step_time=0.001))
    words = split("--clients 3 --requests 9 --warmup 0 --max-new-tokens 1000000 --no-native --json")
    assert bench.bench_bridge(bridge.start(), parsed(*words, str(as_json))) == 130
    content = load(as_json)
    assert (content["summary"]["ok"], content["summary"]["interrupted"]) == (2, 3)
    assert content["summary"]["completion_tokens"] == 6
    agrees_with_itself(content)
    out = capsys.readouterr().out
    assert "\n2 requests from 3 clients" in out
    assert "cover the 2 requests that had ended by then.\nThey leave out the 3 in flight" in out
    engine.wait_for(lambda engine: engine.active == 0)


def test_failed_requests_are_counted(scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests that fail are counted under their kind of error and named, beside those that were answered."""
    as_json = tmp_path / "bench.json"

    def sometimes(request: Request) -> list[str]:
        if prompt_text(request.prompt).startswith(("4:", "5:")):  # the first two were made to count tokens
            raise EngineError("out of\nfingers")
        return ["word "] * 100

    bridge, _ = scripted(ScriptedEngine(sometimes))
    words = split("--clients 3 --requests 8 --max-new-tokens 5 --warmup 0 --no-native --json")
    assert bench.bench_bridge(bridge.start(), parsed(*words, str(as_json))) == 0
    summary = load(as_json)["summary"]
    assert (summary["ok"], summary["failed"], summary["completion_tokens"]) == (6, 2, 30)
    assert summary["errors"]["EngineError"]["count"] == 2
    assert "2 x EngineError: " in capsys.readouterr().out


def test_every_request_failed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """When nothing was answered the exit status says so, and no figure is made up; a failed warm-up ends it at once."""

    def never(request: Request) -> list[str]:
        if not prompt_text(request.prompt).startswith(("1:", "2:")):
            raise EngineError("no")
        return ["word"]

    bridge, _ = scripted(ScriptedEngine(never))
    assert bench.bench_bridge(bridge.start(), parsed("--clients", "2", "--requests", "4", "--warmup", "0")) == 1
    out = capsys.readouterr().out
    assert "4 x EngineError: " in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith(("output", "time to"))] == ["-", "-"]
    with pytest.raises(EngineError, match="warm-up"):
        bench.bench_bridge(bridge.start(), parsed("--clients", "2", "--requests", "4"))


def test_an_engine_that_dies_without_the_bridge(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that dies while it is measured alone ends that measurement instead of hanging it; the rest is shown."""

    def dies(request: Request) -> list[str]:
        if request.client != "native":
            return ["word"] * 3
        engine.crash(RuntimeError("burnt out"))
        return ["word"] * 100_000

    engine = ScriptedEngine(dies)
    bridge, _ = scripted(engine)
    bench.bench_bridge(bridge.start(), parsed(*split("--clients 2 --requests 2 --warmup 0 --max-new-tokens 100000")))
    share = next(line for line in capsys.readouterr().out.splitlines() if "share" in line)
    assert "-" in share
    assert "burnt out" in share


def test_ctrl_c_without_the_bridge(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C while the engine is measured alone shows what the bridge was measured at, and frees the engine."""

    def endless(request: Request) -> list[str]:
        if request.client != "native":
            return ["word"] * 3
        if next(once, False):
            _thread.interrupt_main()
        return ["word"] * 1_000_000

    once = iter([True])
    bridge, engine = scripted(ScriptedEngine(endless))
    words = split("--clients 2 --requests 4 --warmup 0 --max-new-tokens 1000000")
    assert bench.bench_bridge(bridge.start(), parsed(*words)) == 130
    out = capsys.readouterr().out
    assert "2 requests from 2 clients" in out
    assert "They leave out the 0 in flight" in out
    engine.wait_for(lambda engine: engine.active == 0)


def test_no_client_is_left_idle(scripted: Scripted, tmp_path: Path) -> None:
    """With few requests for many clients the load is not halved, or half of the clients would have nothing to do."""
    bridge, _ = scripted(ScriptedEngine(lambda request: ["word"] * 9))
    as_json = tmp_path / "bench.json"
    words = split("--clients 4 --requests 7 --warmup 0 --max-new-tokens 4 --json")
    assert bench.bench_bridge(bridge.start(), parsed(*words, str(as_json))) == 0
    content = load(as_json)
    assert [part["requests"] for part in content["rounds"] + content["native_rounds"]] == [7, 7]


def test_native_keeps_to_the_batch(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    """More clients than the engine takes at once: alone, too, it is never given more than that."""
    engine = ScriptedEngine(lambda request: ["word"] * 9, step_time=0.005, max_batch_size=3)
    bridge, _ = scripted(engine)
    most = 0
    add = engine.add_request

    def watched(request: Request, sink: Any) -> None:
        nonlocal most
        add(request, sink)
        most = max(most, engine.active)

    engine.add_request = watched  # type: ignore[method-assign]
    assert bench.bench_bridge(bridge.start(), parsed(*split("--clients 8 --requests 24 --max-new-tokens 4"))) == 0
    assert most == 3
    assert "3 at most" in capsys.readouterr().out


# --- its parts ---


def test_prompts() -> None:
    """Prompts are about as long as asked, all different from the first word, and the same for the same seed."""

    def count(text: str) -> int:
        return 7 + len(text) // 3

    prompts = Prompts(100, 0, seed=5, count=count).make(50)
    assert prompts == Prompts(100, 0, seed=5, count=count).make(50)
    assert prompts != Prompts(100, 0, seed=6, count=count).make(50)
    assert len({prompt.split()[0] for prompt in prompts}) == 50
    assert sum(map(count, prompts)) / 50 == pytest.approx(100, rel=0.1)
    shared = Prompts(100, 60, seed=5, count=count).make(50)
    same = next(end for end in range(999) if len({prompt[:end] for prompt in shared}) > 1) - 1
    assert count(shared[0][:same]) == pytest.approx(60, abs=10)
    assert sum(map(count, shared)) / 50 == pytest.approx(100, rel=0.1)


def test_quantiles() -> None:
    """The figures printed are those of the values, known ones in any order."""
    spread = Quantiles.of([None, *range(100, -1, -1)])
    assert spread == Quantiles(count=101, mean=50, p50=50, p90=90, p99=99, max=100)
    assert Quantiles.of([3.0]) == Quantiles(1, 3, 3, 3, 3, 3)
    assert Quantiles.of([None]) is None


# --- a server ---


class FakeServer(ThreadingHTTPServer):
    """A fake OpenAI-compatible server: real HTTP and real streams, below the client under test; no model.

    Each answer has six words, and the usage says six tokens. ``plan`` gives the status of each request in turn, and
    200 afterwards; 0 breaks the stream off. ``together`` requests wait for each other before they are answered.
    """

    def __init__(self, plan: list[int], together: int, usage: bool, models: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.plan = plan
        self.together = Barrier(together)
        self.usage = usage
        self.models = models
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = Lock()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves as one packet, or the client's system delays it by 40 ms

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in self.server.models]
        self._say(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            status = self.server.plan.pop(0) if self.server.plan else 200
        self.server.together.wait(30)
        usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15} if self.server.usage else None
        if status not in (0, 200):
            self._say(status, {"error": {"message": f"status {status}", "type": "x", "param": None, "code": None}})
        elif body.get("stream"):
            self._stream(usage, broken=status == 0)
        else:
            message = {"role": "assistant", "content": "a b c d e f"}
            choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
            self._say(200, {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _stream(self, usage: dict[str, int] | None, broken: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
        deltas += [({"content": f"{word} "}, None) for word in "abcdef"]
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            for delta, reason in ([*deltas[:3]] if broken else [*deltas, ({}, "length")])
        ]
        chunks += [{"choices": [], "usage": usage}] if usage and not broken else []
        for chunk in chunks:
            self._event(json.dumps({**_HEAD, "object": "chat.completion.chunk", **chunk}))
        if not broken:
            self._event("[DONE]")
        self.close_connection = True

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _say(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


_HEAD = {"id": "x", "created": 0, "model": "fake"}


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., FakeServer]:
    def serve(
        plan: tuple[int, ...] = (), together: int = 1, usage: bool = True, models: tuple[str, ...] = ("fake",)
    ) -> FakeServer:
        server = FakeServer(list(plan), together, usage, list(models))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def end() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        request.addfinalizer(end)
        return server

    return serve


def test_a_server(run: Run, serve: Callable[..., FakeServer], tmp_path: Path) -> None:
    """Clients ask at once, with nothing that only some servers know; the figures add up, and the share is "-"."""
    server, as_json = serve(together=4), tmp_path / "bench.json"
    words = split("--clients 4 --requests 8 --prompt-tokens 20 --max-new-tokens 6 --api-key sesame --json")
    done = run("bench", "--url", server.url, *words, str(as_json))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    content = load(as_json)
    summary, rows = content["summary"], content["requests"]
    assert (summary["ok"], summary["prompt_tokens"], summary["completion_tokens"]) == (8, 8 * 9, 8 * 6)
    assert summary["tokens_counted"] == "usage"
    assert all(ordered(summary[name]) for name in SPREADS[:3])
    assert (summary["queue_time"], summary["bridge_share"], summary["batch_max"]) == (None, None, None)
    assert all(0 < row["first_token"] <= row["total"] for row in rows)
    assert {frozenset(body) for body in server.bodies} == {
        frozenset({"model", "messages", "max_tokens", "stream", "stream_options"})
    }
    assert len({body["messages"][0]["content"] for body in server.bodies}) == len(server.bodies) == 12  # 4 to warm up
    assert server.keys == {"Bearer sesame"}
    assert "sesame" not in as_json.read_text() + done.stdout
    assert [line.split()[3] for line in done.stdout.splitlines() if "share" in line] == ["-"]
    assert "approximately 20 words per prompt" in done.stdout


def test_a_server_that_fails(run: Run, serve: Callable[..., FakeServer], tmp_path: Path) -> None:
    """Statuses 429 and 500 and a stream that breaks off are counted apart, tried once, and not taken for answers."""
    server, as_json = serve(plan=(429, 200, 500, 429, 0)), tmp_path / "bench.json"
    words = split("--model fake --clients 2 --requests 8 --warmup 0 --json")
    done = run("bench", "--url", server.url, *words, str(as_json))
    assert done.returncode == 0
    content = load(as_json)
    summary = content["summary"]
    counts = {kind: error["count"] for kind, error in summary["errors"].items()}
    assert counts == {"429 RateLimitError": 2, "500 InternalServerError": 1, "EngineError": 1}
    assert (summary["ok"], summary["failed"]) == (4, 4)
    assert len(content["requests"]) == len(server.bodies) == 8
    assert "2 x 429 RateLimitError: " in done.stdout


def test_a_server_that_only_fails(run: Run, serve: Callable[..., FakeServer]) -> None:
    """When every request failed the exit status is 1."""
    server = serve(plan=(500,) * 4)
    done = run("bench", "--url", server.url, *split("--clients 2 --requests 4 --warmup 0"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "4 x 500 InternalServerError: " in done.stdout


def test_a_server_that_counts_nothing(run: Run, serve: Callable[..., FakeServer], tmp_path: Path) -> None:
    """Without usage the pieces of a stream count, said so; and without a stream, nothing that was not seen is told."""
    server, as_json = serve(usage=False), tmp_path / "bench.json"
    words = ["--url", server.url, *split("--clients 1 --requests 2 --warmup 0 --json"), str(as_json)]
    done = run("bench", *words)
    assert "each piece of a stream counts as one" in done.stdout
    summary = load(as_json)["summary"]
    assert (summary["tokens_counted"], summary["completion_tokens"]) == ("pieces", 12)
    assert summary["total_tokens_per_second"] is None
    done = run("bench", *words, "--no-stream")
    assert done.returncode == 0
    summary = load(as_json)["summary"]
    assert (summary["ok"], summary["completion_tokens"], summary["time_to_first_token"]) == (2, None, None)


def test_which_model(run: Run, serve: Callable[..., FakeServer]) -> None:
    """A server with several models wants one named, and one that is not there says so."""
    server = serve(models=("small", "large"))
    done = run("bench", "--url", server.url)
    assert_one_line(done.stderr, ["small", "large", "--model"])
    done = run("bench", "--url", "http://127.0.0.1:9/v1")
    assert_one_line(done.stderr, ["http://127.0.0.1:9/v1", "server"])


# --- mistakes ---


@pytest.mark.parametrize(
    ("package", "words"), [("matplotlib", ["--plot", "bench.png"]), ("openai", ["--url", "http://127.0.0.1:9/v1"])]
)
def test_missing_extras(run: Run, package: str, words: list[str]) -> None:
    """A package that is not installed is named with its pip command before any model is loaded."""
    hidden = f"import sys; sys.modules[{package!r}] = None; "
    code = f"{hidden}from lmbridge.cli import main; sys.exit(main({['bench', *words]!r}))"
    done = run(command=[sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, [package, 'pip install "lmbridge[bench]"'])


@pytest.mark.parametrize(
    ("status", "words", "named"),
    [
        (2, ["--clients", "0"], ["--clients", "0"]),
        (2, ["--rate", "-1"], ["--rate", "-1"]),
        (2, ["--requests", "many"], ["--requests", "many"]),
        (2, ["--json", "/no/such/folder/bench.json"], ["--json", "/no/such/folder"]),
        (2, ["--plot", "."], ["--plot"]),
        (2, ["--shared-prefix", "200"], ["--shared-prefix", "--prompt-tokens", "`lmbridge bench --help`"]),
        (2, ["--model", "demo"], ["--model", "--url", "lmbridge bench MODEL"]),
        (2, ["demo", "--url", "http://x/v1"], ["MODEL", "--url"]),
        (2, ["--url", "http://x/v1", "--option", "device=cpu"], ["--option", "--url"]),
        (2, ["--url", "http://x/v1", "--engine", "vllm"], ["--engine", "--url"]),
        (2, ["--url", "localhost:8000/v1"], ["'localhost:8000/v1'", "http://"]),
        (1, ["./no-such-folder"], ["no-such-folder"]),
    ],
)
def test_mistakes(run: Run, status: int, words: list[str], named: list[str]) -> None:
    """A wrong option is told in one line that names it, before anything is loaded or sent."""
    done = run("bench", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert_one_line(done.stderr, named)


def test_help(run: Run) -> None:
    """--help says what is measured, names the options, and fits a terminal."""
    done = run("bench", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in (
        "--clients",
        "--rate",
        "--url",
        "--no-stream",
        "--no-native",
        "--json",
        "--plot",
        "The bridge's share",
    ):
        assert name in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def assert_one_line(text: str, words: list[str]) -> None:
    assert text.startswith("lmbridge: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    assert [word for word in words if word not in text] == []
