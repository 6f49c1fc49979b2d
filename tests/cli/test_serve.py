"""``lmbridge serve`` for real: a process of its own, asked over HTTP, ended by signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.conftest import ENVIRONMENT, LMBRIDGE, PATIENCE, ROOT
from tests.conftest import until

if TYPE_CHECKING:
    from tests.cli.conftest import Run

SERVED = [sys.executable, str(Path(__file__).parent / "served.py")]
GATED = ("a-model", "--engine", "gated", "--no-page")
ENDLESS = "count 1000000"


class Served:
    """A server that runs, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.printed: list[str] = []
        self.url = re.findall(r"http://[\w.:]+", self.read_until("Listening on"))[0]

    def read_until(self, text: str) -> str:
        """The line that has ``text``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if text in line:
                return line
        pytest.fail(f"it ended before it said {text!r}: {''.join(self.printed)}")

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> Answer:
        """The answer to one request, on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE)) as to:
            headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
            data = body if body is None or isinstance(body, (str, Iterator)) else json.dumps(body)
            to.request(method, path, data, headers)
            response = to.getresponse()
            return Answer(response.status, dict(response.headers), response.read().decode())

    def chat(self, content: str, key: str | None = None, **more: Any) -> Answer:
        messages = [{"role": "user", "content": content}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 10**6, **more}, key)

    def wait_until(self, path: str, status: int) -> Answer:
        """The answer to a GET once it has that status."""
        answers: list[Answer] = []

        def has_come() -> bool:
            answers[:] = [self.ask("GET", path)]
            return answers[0].status == status

        until(has_come, PATIENCE)
        return answers[0]

    def model(self) -> dict[str, Any]:
        """What /status says of the one model."""
        (numbers,) = self.ask("GET", "/status").json["models"].values()
        return dict(numbers)

    def end(self, *signals: signal.Signals) -> int:
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


class Answer:
    """Of one request."""

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.text = text

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@contextlib.contextmanager
def serving(*arguments: str, command: list[str] = SERVED, **environment: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [*command, "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    try:
        yield Served(process)
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def streaming(served: Served, content: str = ENDLESS) -> Iterator[http.client.HTTPResponse]:
    """An answer that is being streamed, its first token read."""
    to = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=PATIENCE)
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 10**6}
    to.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = to.getresponse()
    assert response.status == 200, response.read()
    while b'"0 ' not in (line := response.readline()):
        assert line
    try:
        yield response
    finally:
        to.close()


def test_a_newcomer(run: Run) -> None:
    """The bundled model: not ready at first, and says so; then the curl line that is printed works as it stands."""
    with serving("demo", command=LMBRIDGE) as served:
        first = served.ask("GET", "/ready")
        assert (first.status, first.json["models"]["demo"]["state"]) == (503, "starting")
        assert served.ask("GET", "/health").status == 200
        page, curl, openai = (served.read_until(f"  {name}:") for name in ("page", "curl", "openai"))
        assert f'base_url="{served.url}/v1"' in openai
        assert f"{served.url}/" in page
        assert served.ask("GET", "/ready").status == 200
        done = run(command=["bash", "-c", curl.partition("curl:")[2]])
        assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]
        assert served.end(signal.SIGINT) == 0


def test_it_tells_the_truth_while_it_loads(tmp_path: Path) -> None:
    """Alive but not ready while the model loads; a question asked meanwhile waits and is answered."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with serving(*GATED, "--option", f"gate={gate}") as served:
        assert served.wait_until("/health", 200).json["models"]["a-model"]["state"] in ("new", "starting")
        assert served.ask("GET", "/ready").headers["retry-after"] == "1"
        assert 'lmbridge_ready{model="a-model"} 0.0' in served.ask("GET", "/metrics").text
        gate.write_bytes(b"")
        assert served.chat("one two").json["choices"][0]["message"]["content"] == "one two "
        served.wait_until("/ready", 200)


def test_running_answers_finish() -> None:
    """SIGTERM: the answer that streams comes whole, what is new is refused with 503, and the exit status is 0."""
    with serving(*GATED, "--option", "step_time=0.02") as served, streaming(served, "count 100") as response:
        served.process.send_signal(signal.SIGTERM)
        refused = served.wait_until("/ready", 503)
        assert refused.json["draining"]
        refused = served.chat("too late")
        assert (refused.status, refused.json["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        rest = response.read().decode()
        assert '"99 "' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert served.process.wait(PATIENCE) == 0


def test_answers_that_take_too_long_are_cut() -> None:
    """After --drain-timeout what still runs is aborted, its reader is told so, and the exit status is 0."""
    arguments = (*GATED, "--option", "step_time=0.02", "--drain-timeout", "0.1")
    with serving(*arguments) as served, streaming(served) as response:
        assert served.end() == 0
        assert "error" in response.read().decode()
        assert "aborted after 0.1 s: 1" in served.read_until("aborted")


def test_a_second_signal_ends_at_once() -> None:
    """Who does not want to wait for the drain asks again."""
    with serving(*GATED, "--option", "step_time=0.02") as served, streaming(served):
        served.process.send_signal(signal.SIGINT)
        served.read_until("Finishing")
        assert served.end(signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_signal_while_it_loads(tmp_path: Path) -> None:
    """Nobody has to wait for a model that nobody wants any more."""
    os.mkfifo(tmp_path / "never")
    with serving(*GATED, "--option", f"gate={tmp_path / 'never'}") as served:
        assert served.end() == 0


def test_keys(tmp_path: Path) -> None:
    """Keys from the environment and from a file open the API; probes need none."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfrom-file\n")
    with serving(*GATED, "--api-keys-file", str(keys), LMBRIDGE_API_KEYS="from-environment,another") as served:
        assert served.chat("hello").status == 401
        assert served.chat("hello", "wrong").status == 401
        for key in ("from-file", "from-environment", "another"):
            assert served.chat("hello", key).status == 200
        assert served.ask("GET", "/health").status == 200
        assert '"Authorization: Bearer $KEY"' in served.read_until("  curl:")


def test_a_crowd() -> None:
    """More requests than places: 429 with Retry-After in the API's own form, while probes are answered."""
    arguments = (*GATED, "--option", "step_time=0.02", "--threads", "2")
    with serving(*arguments) as served, streaming(served), streaming(served):
        refused = served.chat("one more")
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        assert served.ask("GET", "/health").status == 200
        assert served.model()["running"] == 2


def test_a_client_that_leaves_frees_its_place() -> None:
    """A connection that is dropped while the model is silent is noticed, without a token or heartbeat to send."""
    arguments = (*GATED, "--option", "step_time=3600", "--heartbeat", "3600", "--name", "silent")
    with serving(*arguments) as served:
        with socket.create_connection(served.url.removeprefix("http://").split(":")) as client:
            body = b'{"messages": [{"role": "user", "content": "hello"}], "stream": true}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            assert served.model()["running"] == 1
        until(lambda: not served.model()["running"], PATIENCE)
        assert served.ask("GET", "/status").json["disconnects"] == 1


def test_swap() -> None:
    """With an admin key the model is exchanged under its name, with news of how it goes."""
    with serving(*GATED, "--name", "stable", LMBRIDGE_ADMIN_KEY="root") as served:
        served.wait_until("/ready", 200)
        assert served.ask("POST", "/admin/swap", {"to": "new"}, "wrong").status == 401
        answer = served.ask("POST", "/admin/swap", {"to": "new", "engine": "gated"}, "root")
        last = json.loads(answer.text.splitlines()[-1])
        assert (answer.status, last["outcome"], last["model"], last["to"]) == (200, "done", "stable", "new")
        assert served.chat("hello", model="stable").status == 200


def test_models_of_several_kinds(run: Run) -> None:
    """One process serves a model of each kind with its own queue; the lines that it prints work as they stand."""
    arguments = ("--embed", "./a/minilm", "--rerank", "./a/ranker", "--encoder-option", "max_batch_size=7")
    with serving(*GATED, *arguments) as served:
        chat, embed, rerank = (served.read_until("  curl:") for _ in range(3))
        assert "openai: OpenAI(" in served.printed[-2]
        assert 'rerank(model="ranker"' in served.read_until("  cohere:")
        for line, key in ((chat, "choices"), (embed, "data"), (rerank, "results")):
            done = run(command=["bash", "-c", line.partition("curl:")[2]])
            assert json.loads(done.stdout)[key], done.stdout
        listed = served.ask("GET", "/v1/models").json["data"]
        assert [(one["id"], one["lmbridge"]["tasks"]) for one in listed] == [
            ("a-model", ["generate"]), ("minilm", ["embed"]), ("ranker", ["rerank"])
        ]  # fmt: skip
        answers = {
            "/v1/embeddings": {"input": "a"},
            "/v1/rerank": {"query": "a", "documents": ["a"]},
            "/v2/rerank": {"query": "a", "documents": ["a"]},
            "/rerank": {"query": "a", "texts": ["a"]},
        }
        for path, body in answers.items():
            assert served.ask("POST", path, body).status == 200
        assert served.chat("hello").json["model"] == "a-model"
        models = served.ask("GET", "/status").json["models"]
        assert [models[name]["requests"]["stop"] for name in ("a-model", "minilm", "ranker")] == [2, 3, 5]
        assert models["minilm"]["engine"]["max_batch_size"] == 7
        assert 'lmbridge_requests_total{model="ranker",outcome="stop"} 5.0' in served.ask("GET", "/metrics").text
        assert served.end() == 0


def test_a_function(tmp_path: Path) -> None:
    """A function that yields is served to OpenAI's clients as it stands; a limit is kept where it says that it does."""
    (tmp_path / "an_app.py").write_text(FUNCTIONS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}]}
    shout, keep = (("--engine", "function", f"an_app:{name}", "--no-page") for name in ("shout", "keep"))
    with serving(*shout, PYTHONPATH=path) as served:
        answer = served.ask("POST", "/v1/chat/completions", body)
        assert answer.json["choices"][0]["message"]["content"] == "ONE TWO THREE "
        assert served.ask("POST", "/v1/chat/completions", {**body, "max_tokens": 2}).status == 400, answer.text
    with serving(*keep, "--option", "supports=max_new_tokens", PYTHONPATH=path) as served:
        answer = served.ask("POST", "/v1/chat/completions", {**body, "max_tokens": 2})
        assert answer.json["choices"][0]["message"]["content"] == "one two "


def test_a_function_of_lists(run: Run) -> None:
    """What no route could serve is refused at the start, with what would help."""
    done = run("serve", "builtins:sorted", "--engine", "function", "--port", "0")
    assert done.returncode == 1
    assert "task=generate" in done.stderr


FUNCTIONS = """
from lmbridge import prompt_text

async def shout(prompt):
    for word in prompt_text(prompt).split():
        yield word.upper() + " "

def keep(prompt, config):
    for word in prompt_text(prompt).split()[: config.max_new_tokens]:
        yield word + " "
"""


def test_an_encoder_alone() -> None:
    """Who wants no language model gets none: neither the bundled one beside --embed, nor another."""
    with serving("--no-page", "--embed", "minilm") as served:
        assert "/v1/embeddings" in served.read_until("  curl:")
        assert served.ask("POST", "/v1/embeddings", {"input": "a"}).status == 200
        assert served.chat("hello").status == 400
        assert [one["id"] for one in served.ask("GET", "/v1/models").json["data"]] == ["minilm"]


def test_logs() -> None:
    """The access log names what was asked for, and no log has a prompt unless asked to."""
    with serving(*GATED, "--access-log") as served:
        served.chat("a secret")
        assert re.search(r"127.0.0.1 POST /v1/chat/completions 200 [\d.]+ s", served.read_until(" POST /v1/"))
        assert served.end() == 0
        assert "secret" not in "".join(served.printed)
    with serving(*GATED, "--log-prompts") as served:
        served.wait_until("/ready", 200)
        served.chat("a secret")
        assert "a secret" in served.read_until("secret")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("./no-such-folder",), 1, ["no-such-folder"]),
        (("a-model", "--engine", "no-such-engine"), 2, ["no-such-engine"]),
        (("a-model", "--engine", "broken", "--port", "0"), 1, ["could not be loaded", "no such weights"]),
        (("--api-keys-file", "/no/such/file"), 1, ["--api-keys-file: /no/such/file"]),
        (("--embed", "ranker", "--port", "0"), 1, ["ranker is a reranking model", "--rerank"]),
        (("--rerank", "minilm", "--port", "0"), 1, ["could not be loaded", "no weights for reranking"]),
        (("--embed", "./a/minilm", "--rerank", "./b/minilm"), 2, ["two models", "'minilm'", "rename one"]),
        (("./a/minilm", "--embed", "./b/minilm"), 2, ["two models", "'minilm'", "--name"]),
        (("--embed", "minilm", "--name", "x"), 2, ["--name is for a language model"]),
        (("a-model", "--encoder-option", "device=cpu"), 2, ["--encoder-option is for --embed and --rerank"]),
        (("--embed", "minilm", "--encoder-option", "colour=red"), 1, ["no colour", "max_batch_size"]),
        (("--embed", "minilm", "--encoder-option", "red"), 2, ["'red'", "NAME=VALUE"]),
        (("--host", "256.1.1.1"), 1, ["256.1.1.1", "--host"]),
        (("--host", "192.0.2.1"), 1, ["192.0.2.1", "no such address", "0.0.0.0"]),
        (("--threads", "0"), 2, ["--threads", "'0'"]),
        (("--port", "70000"), 2, ["--port", "70000"]),
        (("--drain-timeout", "soon"), 2, ["--drain-timeout", "soon"]),
        (("--timeout", "0"), 2, ["--timeout", "above 0"]),
        (("--heartbeat", "inf"), 2, ["--heartbeat", "inf"]),
        (("--allowed-host", "https://a.example"), 2, ["--allowed-host", "https://a.example"]),
        (("--max-pending-per-client", "none"), 2, ["--max-pending-per-client", "none"]),
    ],
)
def test_mistakes(run: Run, arguments: tuple[str, ...], status: int, words: list[str]) -> None:
    """What cannot work is told in one line, by the exit status, and at once."""
    done = run("serve", "--no-page", *arguments, command=SERVED)
    assert done.returncode == status
    assert done.stderr.startswith("lmbridge: ")
    assert done.stderr.count("\n") == 1
    assert [word for word in words if word not in done.stderr] == []


def test_a_port_in_use(run: Run) -> None:
    """Another program on the port is one clear line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", *GATED, "--port", port, command=SERVED)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"lmbridge: 127.0.0.1, port {port}: another program is already listening there; choose another port with "
        "--port.\n"
    )
