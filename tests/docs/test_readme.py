"""The README's code runs as it stands there."""

from __future__ import annotations

import json
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
    """The README has the examples that the other tests here run, and those for real models."""
    assert [options for options, _ in blocks()] == [
        "",
        ":class: needs-a-hub",
        "",
        "",
        "",
        ":class: needs-a-hub",
        "",
        "",
    ]


def test_first_example() -> None:
    """The first example answers, streams a story and computes in eight threads."""
    out = run(blocks()[0][1])
    assert "Paris" in out
    assert "fox" in out
    assert all(f"{n} + {n} = {2 * n}." in out for n in range(8))


@pytest.mark.long
def test_third_example() -> None:
    """Lists, futures, clients, chats and asyncio work as the README shows."""
    out = run(blocks()[2][1])
    for expected in ("85", "cold", "Lima", "42", "green"):
        assert expected in out


@pytest.mark.long
def test_hub_example_differs_from_the_first_by_its_model_only() -> None:
    """The example with a real model compiles, and runs when the bundled model stands in for the hub's."""
    source = blocks()[1][1]
    assert source.count('"Qwen/Qwen3-0.6B"') == 1
    assert run(source.replace("Qwen/Qwen3-0.6B", "demo").replace("Why is the sky blue?", "What is 2 + 2?")).strip()


@pytest.mark.long
def test_tools_example() -> None:
    """An answer keeps to its schema, and a function is called as it wants to be."""
    answer, calls = run(blocks()[3][1]).splitlines()
    assert list(json.loads(answer)) == ["capital"]
    assert calls.startswith("[ToolCall(index=0, id='call_")
    assert "name='add'" in calls


def test_function_example() -> None:
    """A function serves single items and lists."""
    assert run(blocks()[4][1]).split() == ["ONE", "['TWO',", "'THREE']"]


def test_encoder_example_compiles() -> None:
    """Its model cannot be fetched everywhere."""
    compile(blocks()[5][1], "README.rst", "exec")


def test_text_function_example() -> None:
    """A function that yields answers prompts."""
    assert run(blocks()[6][1]).split() == ["HELLO", "WORLD"]


@pytest.mark.long
def test_flask_example() -> None:
    """The Flask views answer, the second in a stream."""
    ask = 'print(app.test_client().post("/ask", json={"prompt": "What is the capital of Kenya?"}).get_json())'
    tell = 'print(app.test_client().post("/tell", json={"prompt": "What is the capital of Peru?"}).text)'
    out = run("\n".join([blocks()[7][1], ask, tell]))
    assert "Nairobi" in out
    assert "Lima" in out


@pytest.mark.parametrize("number", range(2))
def test_commands_are_one_line_each(number: int) -> None:
    """The two commands a newcomer types can be copied as one line each."""
    commands = re.findall(r"^   \$ (.*)$", README.read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert "\\" not in commands[number]
