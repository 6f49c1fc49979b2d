"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.rst"
BLOCK = re.compile(r"\.\. code-block:: python\n((?:   :.*\n)*)\n((?:(?:   .*)?\n)+)")


def blocks() -> list[tuple[str, str]]:
    """(options, source) of each Python block."""
    return [(options.strip(), textwrap.dedent(source)) for options, source in BLOCK.findall(README.read_text())]


def run(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_blocks() -> None:
    """The README has the examples that the other tests here run."""
    assert [options for options, _ in blocks()] == ["", ":class: needs-a-hub", "", "", ""]


def test_first_example() -> None:
    """The first example answers, streams a story and computes in eight threads."""
    out = run(blocks()[0][1])
    assert "Paris" in out
    assert "fox" in out
    assert all(f"{n} + {n} = {2 * n}." in out for n in range(8))


def test_hub_example() -> None:
    """With an engine that answers as a large model would, JSON keeps to the schema and the function is called."""
    source = blocks()[1][1]
    assert source.count('Bridge("Qwen/Qwen3-0.6B")') == 1
    stand_in = """
from lmbridge import Delta, ToolCall
from lmbridge.testing import ScriptedEngine

def script(request):
    if request.config.response_format is not None:
        return ['{"name": "Oslo", ', '"country": "Norway"}']
    if request.prompt[-1]["role"] == "tool":
        return ["It says: ", request.prompt[-1]["content"]]
    return [Delta(tool_calls=[ToolCall(0, "call_1", "weather", '{"city": "Oslo"}')])]

engine = ScriptedEngine(script)
"""
    out = run(stand_in + source.replace('"Qwen/Qwen3-0.6B"', "engine")).splitlines()
    assert out == ['{"name": "Oslo", "country": "Norway"}', "It says: It rains in Oslo."]


@pytest.mark.long
def test_lists_and_futures_example() -> None:
    """Lists, futures and asyncio work as the README shows."""
    assert run(blocks()[2][1]).strip() == "37 + 48 = 85. The opposite of hot is cold. Grass is green."


def test_function_example() -> None:
    """A function serves single items and lists."""
    assert run(blocks()[3][1]).split() == ["ONE", "['TWO',", "'THREE']"]


@pytest.mark.long
def test_flask_example() -> None:
    """The Flask views answer, the second in a stream."""
    ask = 'print(app.test_client().post("/ask", json={"prompt": "What is the capital of Kenya?"}).get_json())'
    tell = 'print(app.test_client().post("/tell", json={"prompt": "What is the capital of Peru?"}).text)'
    empty = 'print(app.test_client().post("/ask", json={}).status)'
    out = run("\n".join([blocks()[4][1], ask, tell, empty]))
    assert "Nairobi" in out
    assert "Lima" in out
    assert "400" in out


@pytest.mark.parametrize("number", range(2))
def test_commands_are_one_line_each(number: int) -> None:
    """The two commands a newcomer types can be copied as one line each."""
    commands = re.findall(r"^   \$ (.*)$", README.read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert "\\" not in commands[number]
