"""Every example runs offline as its docstring says, and each answer is right for its own question."""

from __future__ import annotations

import re
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.examples.conftest import RunExample, StartExample

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is 37 + 48?": "85",
    "What is 21 + 72?": "93",
    "What is the opposite of hot?": "cold",
    "Tell me a story about a fox.": "fox",
    "Tell me a story about an owl.": "owl",
    "Tell me a story about a whale.": "whale",
}


@pytest.mark.long
def test_threads(run_example: RunExample) -> None:
    """The two clients of the page that this library began with are both served."""
    lines = run_example("threads.py").splitlines()
    prompts = {line.split(" -> ")[0]: line.split(" -> ")[1] for line in lines}
    assert sorted(prompts) == ["Hakuna Matata", "giraffes are heartless creatures"]
    assert all(prompts.values())


@pytest.mark.long
def test_streaming(run_example: RunExample) -> None:
    """One story comes whole, with its counts; the other is left in the middle and says so."""
    story, counts, left, reason = run_example("streaming.py").splitlines()
    assert "fox" in story
    assert "completion_tokens=" in counts
    assert "first_token=" in counts
    assert left.endswith(" ...")
    assert len(left) < 80
    assert reason.endswith(": abort")


@pytest.mark.long
def test_thread_pool(run_example: RunExample) -> None:
    """A pool's map gives the answers in order, and every future has its own question's answer."""
    lines = run_example("thread_pool.py").splitlines()
    capitals = ("Paris", "Tokyo", "Lima", "Nairobi", "Oslo", "Cairo", "Havana", "Kathmandu")
    for line, capital in zip(lines, capitals, strict=False):
        assert capital in line.split("?")[1]
    sums = {line.split("?")[0]: line.split("?")[1] for line in lines[len(capitals) :]}
    assert len(sums) == 8
    for n in range(1, 9):
        assert re.search(rf"\b{2 * n}\b", sums[f"{n} + {n}"].split("=")[-1])


@pytest.mark.long
def test_tools(run_example: RunExample) -> None:
    """The example that shows how to give a model functions would call none."""
    called, said = run_example("tools.py").splitlines()[:2]
    assert called.startswith("stock('")
    assert said.startswith("The model says: ")


@pytest.mark.long
def test_flask_app(start_example: StartExample) -> None:
    """Concurrent HTTP requests to a threaded server each get their own answer, and Ctrl-C ends it cleanly."""
    with start_example("flask_app.py", "0") as server:
        url = listening_url(server)
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            answers = list(pool.map(lambda question: ask(url, question), QUESTIONS))
        for answer, word in zip(answers, QUESTIONS.values(), strict=True):
            assert re.search(rf"\b{word}\b", answer), answers
        assert '{"text"' in ask(url.replace("/infer", "/stream"), "What is the capital of France?")
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, "")
        with refused.value:
            assert refused.value.code == 400
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
        assert "Traceback" not in err


def listening_url(server: subprocess.Popen[str]) -> str:
    """Where the server listens, once it does; the test's own timeout bounds the wait."""
    assert server.stdout
    assert server.stderr
    for line in server.stdout:
        if found := re.search(r"http://\S+/infer", line):
            return found[0]
    raise AssertionError(server.stderr.read())


def ask(url: str, prompt: str) -> str:
    query = urllib.parse.urlencode({"prompt": prompt})
    with urllib.request.urlopen(f"{url}?{query}", timeout=60) as reply:
        return str(reply.read().decode())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    """An example is read from top to bottom in a minute, says what it shows, and says how to run it."""
    source = path.read_text()
    assert len(source.splitlines()) <= 50
    assert f"python examples/{path.name}" in source.split('"""')[1]
