"""examples/deploying: each file does what docs/deploying says, under the real program that reads it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import until

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "deploying"
METRIC = re.compile(r"\b((?:lmbridge|process)_\w+|up)(?=[{\[\s)]|$)")
OF_PROMETHEUS = {"up"}  # it makes this one itself, for each server that it asks
STORY = b"Tell me a story about a fox."
PATIENCE = 60.0  # seconds after which a test is taken to hang


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def is_ready(url: str) -> bool:
    try:
        return get(f"{url}/ready")[0] == 200
    except urllib.error.URLError:  # nobody listens yet
        return False


@contextmanager
def running(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the folder of the examples, which is ended in the end."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "BEHIND_PROXY": "1"}
    with log.open("wb") as file, subprocess.Popen(command, cwd=FILES, env=environ, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE)


@contextmanager
def on_gunicorn(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The app under gunicorn as it is configured there, ready."""
    url = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "-b", url, *options, "app:create_app()"]
    with running(*command, log=folder / "gunicorn.log") as process:
        until(lambda: is_ready(f"http://{url}"), PATIENCE)
        yield f"http://{url}", process


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_gunicorn(tmp_path_factory.mktemp("gunicorn")) as (url, _):
        yield url


@contextmanager
def behind_nginx(server: str) -> Iterator[str]:
    """A real nginx with the file as it stands, but for its ports, in front of a server that is ready."""
    program = shutil.which("nginx") or pytest.skip("there is no nginx: apt-get install nginx-light")
    port = free_port()
    site = (FILES / "nginx.conf").read_text().replace("listen 80;", f"listen 127.0.0.1:{port};")
    site = site.replace("http://127.0.0.1:8000", server)
    with tempfile.TemporaryDirectory(prefix="nginx") as name:
        folder, scratch = Path(name), ""
        folder.chmod(0o755)  # nginx' workers are another user
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            scratch += f"{kind}_temp_path {name}/{kind};\n"
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; pid {name}/pid; error_log {name}/error.log; events {{}}\n"
            f"http {{ access_log off;\n{scratch}{site}\n}}"
        )
        arguments = [program, "-e", f"{name}/error.log", "-c", str(config)]
        subprocess.run([*arguments, "-t"], check=True, capture_output=True, timeout=PATIENCE)
        with running(*arguments, log=folder / "said"):
            until(lambda: is_ready(f"http://127.0.0.1:{port}"), PATIENCE)
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def nginx(app: str) -> Iterator[str]:
    with behind_nginx(app) as url:
        yield url


def tell(url: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A story that streams."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", "/tell", STORY)
    return connection, connection.getresponse()


def figure(url: str, metric: str) -> float:
    found = re.search(rf"^{re.escape(metric)} (\S+)$", get(f"{url}/metrics")[1], re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.long
def test_a_stream_passes_nginx_piece_by_piece(nginx: str) -> None:
    """Behind the proxy a story would come in one lump at its end."""
    connection, answer = tell(nginx)
    assert answer.headers["Server"].startswith("nginx")
    pieces = []
    while piece := answer.read1():
        pieces.append(piece)
    connection.close()
    assert len(pieces) > 10
    assert b'"finish_reason": "stop"' in b"".join(pieces)


@pytest.mark.long
def test_who_leaves_nginx_is_noticed(nginx: str, app: str) -> None:
    """Behind the proxy answers would be generated to their end for clients that have left."""
    before = figure(app, "lmbridge_http_disconnects_total")
    connection, answer = tell(nginx)
    assert answer.read1()
    answer.close()
    connection.close()
    until(lambda: figure(app, "lmbridge_http_disconnects_total") == before + 1)
    until(lambda: figure(app, 'lmbridge_running{model="demo"}') == 0)


@pytest.mark.long
def test_nginx_keeps_what_is_private(nginx: str, app: str) -> None:
    """Anybody could read the figures, or try admin keys."""
    for private in ("metrics", "status", "admin/swap"):
        assert get(f"{nginx}/{private}")[0] == 404
    assert get(f"{nginx}/ready")[0] == get(f"{app}/metrics")[0] == 200


@pytest.mark.long
def test_nginx_passes_the_host_name_on(tmp_path: Path) -> None:
    """Behind the proxy a server would take any host name for its own, which opens it to DNS rebinding."""
    port = str(free_port())
    serve = [sys.executable, "-m", "lmbridge", "serve", "demo", "--port", port, "--allowed-host", "lm.example.org"]
    with running(*serve, log=tmp_path / "serve.log"):
        until(lambda: is_ready(f"http://127.0.0.1:{port}"), PATIENCE)
        with behind_nginx(f"http://127.0.0.1:{port}") as url:
            assert get(f"{url}/v1/models", Host="lm.example.org")[0] == 200
            assert get(f"{url}/v1/models", Host="evil.example.org")[0] == 421


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["", "preload"])
def test_gunicorn_lets_an_answer_finish(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A restart would cut off the answers that run, or an app that is imported before the fork would load nothing."""
    with on_gunicorn(tmp_path, *options) as (url, process):
        connection, answer = tell(url)
        first = answer.read1()
        process.terminate()
        rest = answer.read()
        connection.close()
        assert b'"finish_reason": "stop"' in first + rest
        assert process.wait(PATIENCE) == 0


@pytest.mark.long
def test_gunicorn_timeout_is_not_for_answers(tmp_path: Path) -> None:
    """An answer that takes longer than gunicorn's timeout would be lost with its worker, and the model with it."""
    with on_gunicorn(tmp_path, "--timeout", "1") as (url, _):
        body = {"model": "demo", "prompt": "fox", "max_tokens": 900, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 900
        assert figure(url, 'lmbridge_request_seconds_sum{model="demo"}') > 1  # so it was longer than that


@pytest.mark.long
def test_the_container_is_healthy(app: str, tmp_path: Path) -> None:
    """Docker would call a server sick that is well, or the other way round; or the command would not start."""
    lines = (FILES / "Dockerfile").read_text()
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", lines, re.MULTILINE)
    assert found is not None
    _, *arguments = json.loads(found[1])
    for url, status in ((app, 0), (f"http://127.0.0.1:{free_port()}", 1)):
        asked = [argument.replace("http://127.0.0.1:8000", url) for argument in arguments]
        assert subprocess.run([sys.executable, *asked], capture_output=True, timeout=PATIENCE).returncode == status


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """systemd would refuse the unit, or ignore a line of it."""
    unit = (FILES / "lmbridge.service").read_text().replace("/opt/lmbridge/bin/lmbridge", sys.executable)
    (tmp_path / "lmbridge.service").write_text(unit)
    verify = ["systemd-analyze", "verify", str(tmp_path / "lmbridge.service")]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def expressions() -> list[str]:
    """Every query of the dashboard and of the alerts."""
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    alerts = (FILES / "alerts.yml").read_text()
    return queries + re.findall(r"expr: (?:>\n)?((?:.|\n)*?)\n +(?:for|labels):", alerts)


@pytest.mark.long
def test_every_metric_of_the_dashboard_and_the_alerts_exists(app: str) -> None:
    """A panel would stay empty, or an alert silent, since no metric has that name."""
    connection, answer = tell(app)  # most are there once something was answered
    answer.read()
    connection.close()
    told = get(f"{app}/metrics")[1]
    named = {name for query in expressions() for name in METRIC.findall(query)}
    assert len(named) > 15
    assert "up" in named
    assert {name for name in named - OF_PROMETHEUS if not re.search(rf"^{name}[{{ ]", told, re.MULTILINE)} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus")
def test_prometheus_takes_the_alerts() -> None:
    """Prometheus would not start with the file."""
    subprocess.run(["promtool", "check", "rules", str(FILES / "alerts.yml")], check=True, capture_output=True)
