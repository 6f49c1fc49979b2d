"""``lmbridge serve`` on a port that others reach too: what it refuses, what it warns of, and what it bears."""

from __future__ import annotations

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from tests.cli.conftest import LMBRIDGE, PATIENCE
from tests.cli.test_serve import GATED, serving, streaming

STREAMS = 200
WARNING = "there is no API key"


def test_its_names() -> None:
    """A page that has made its own name lead here reads nothing, while the names that were given are served."""
    with serving(*GATED, "--allowed-host", "LM.example.org", "--allowed-host", ".lan.example") as served:
        for host in ("localhost", "127.0.0.1:1", "[::1]", "10.1.2.3", "lm.example.org:443", "gpu.lan.example"):
            assert served.ask("GET", "/v1/models", Host=host).status == 200, host
        for host in ("evil.example", "example.org", "localhost.evil.example"):
            refused = served.ask("POST", "/v1/chat/completions", {"messages": []}, Host=host)
            assert refused.status == 421, host
            assert f"--allowed-host {host}" in refused.json["error"]["message"]
    with serving(*GATED, "--allowed-host", "*") as served:
        assert served.ask("GET", "/health", Host="any.example").status == 200


def test_orders_that_are_attacks() -> None:
    """Whatever stands in an order to exchange the model is done or refused by name; the model serves on."""
    with serving(*GATED, LMBRIDGE_ADMIN_KEY="root") as served:
        served.wait_until("/ready", 200)

        def refused(body: Any, status: int = 400) -> str:
            answer = served.ask("POST", "/admin/swap", body, "root")
            assert answer.status == status, answer.text
            return str(answer.json["error"])

        order = {"to": "new", "engine": "gated"}
        assert "nests too deeply" in refused('{"to":' + '{"a":' * 100_000)
        for name in ("self", "kwargs", "engine_options", "no_such"):
            assert name in refused({**order, "options": {name: 1}})
        for words, timeouts in {
            "not a JSON number": ("NaN", "Infinity", "-Infinity"),
            "timeout must be": ("-1", "-0.001", "1e999", "9" * 400, "true", '"1"', "[]"),
        }.items():
            for timeout in timeouts:
                assert words in refused(json.dumps(order)[:-1] + f', "timeout": {timeout}}}'), timeout
        for options in ({"trust_remote_code": True}, {"attn_implementation": "someone/kernel"}):
            assert "--allow-remote-code" in refused({"to": "./no-such-folder", "options": options}, 403)
        endless = (b"x" * 65536 for _ in range(1000))
        assert served.ask("POST", "/admin/swap", endless, "root").status == 413
        assert served.ask("POST", "/admin/swap", {**order, "timeout": 5, "overlap": False}, "root").status == 200
        assert served.chat("hello").status == 200
    with serving(*GATED, "--allow-remote-code", "--admin-key", "root") as served:
        answer = served.ask(
            "POST",
            "/admin/swap",
            {"to": "./no-such-folder", "engine": "transformers", "options": {"trust_remote_code": True}},
            "root",
        )
        assert (answer.status, "no-such-folder" in answer.text) == (404, True)


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [((), False), (("--host", "0.0.0.0"), True), (("--host", "0.0.0.0", "--api-key", "k"), False)],
)
def test_an_open_door_is_warned_of(arguments: tuple[str, ...], warns: bool) -> None:
    """Whoever opens the port to a network without a key reads what that means and what to do; nobody else does."""
    with serving(*GATED, *arguments) as served:
        served.read_until("is ready")
        lines = [line for line in served.printed if WARNING in line]
        assert len(lines) == warns
        assert all("0.0.0.0" in line and "LMBRIDGE_API_KEYS" in line and "--host" in line for line in lines)
        assert served.end() == 0


def test_refusals_are_counted() -> None:
    """A crowd that is turned away, and who knocks at doors that are not there, is seen in /metrics."""
    with serving(*GATED, "--option", "step_time=0.02", "--threads", "1") as served, streaming(served):
        for number in range(3):
            assert served.chat("one more").status == 429
            assert served.ask("GET", f"/no/such/{number}").status == 404
        assert served.ask("GET", "/health", Host="evil.example").status == 421
        text = served.ask("GET", "/metrics").text
        for labels, count in {
            'route="/v1/chat/completions",status="429"': 3,
            'route="none",status="404"': 3,
            'route="/health",status="421"': 1,
        }.items():
            assert f"lmbridge_http_answers_total{{{labels}}} {count}.0" in text
        assert "/no/such" not in text


def test_no_line_of_a_log_is_a_clients() -> None:
    """A path or an id with line ends and escapes in it makes no line of its own, and no colours in a terminal."""
    with serving(*GATED, "--access-log") as served:
        forged = "%0A2026-01-01%20INFO%20lmbridge.access:%20forged%1b[31m"
        assert served.ask("GET", f"/v1/models/{forged}").status == 404
        assert served.ask("GET", f"/{forged}").status == 404
        answer = served.ask("GET", "/v1/models", **{"x-request-id": "a forged id"})
        assert re.fullmatch(r"req-[0-9a-f]{24}", answer.headers["x-request-id"])
        assert served.ask("GET", "/v1/models", **{"x-request-id": "\x1b[31m"}).status == 400
        assert served.end() == 0
        served.printed += served.process.stdout or ()
        lines = "".join(served.printed)
        assert "\x1b" not in lines
        assert not re.search(r"^\S+ INFO lmbridge.access: forged", lines, re.MULTILINE)
        assert lines.count(" 404 ") == 2


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_when_nothing_runs(number: signal.Signals) -> None:
    """A restart waits for answers, not for the server: within a second of the signal, on the best of three tries."""

    def seconds() -> float:
        with serving("demo", command=LMBRIDGE) as served:
            served.read_until("page:")
            assert served.chat("Hello").status == 200
            began = time.monotonic()
            assert served.end(number) == 0
            return time.monotonic() - began

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.long
def test_200_streams_with_defaults() -> None:
    """A proxy's users, all at once and from one address: everybody's stream has the status 200 and their own answer."""

    sums = [f"{number % 50} + {30 + number // 50}" for number in range(STREAMS)]

    def ask(number: int) -> str:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"What is {sums[number]}?"}], temperature=0, stream=True
        )
        with stream:
            assert stream.response.status_code == 200
            chunks = [choice for chunk in stream for choice in chunk.choices]
        assert chunks[-1].finish_reason == "stop"
        return "".join(choice.delta.content or "" for choice in chunks)

    with serving("demo", command=LMBRIDGE) as served, ThreadPoolExecutor(STREAMS) as pool:
        served.read_until("page:")
        with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
            answers = list(pool.map(ask, range(STREAMS)))
        assert [
            text for question, text in zip(sums, answers, strict=True) if not text.startswith(f"{question} = ")
        ] == []
        assert served.model()["requests"] == {"stop": STREAMS}
