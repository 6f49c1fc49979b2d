"""The recipe for Celery: real workers, over a broker in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.recipes.conftest import RECIPES, ROOT, Serve, Served, needs

ASK = """
import json
from celery_app import ask
asked = [ask.delay(f"What is {n} + {n}?") for n in range(1, 9)]
print(json.dumps([result.get(timeout=60) for result in asked]))
try:
    ask.delay("").get(timeout=60)
except Exception as error:
    print("refused:", type(error).__name__)
"""

Run = Callable[..., Served]


@pytest.fixture
def run(serve: Serve, tmp_path: Path) -> Run:
    """Runs a command beside the recipe, in a folder where messages lie as in Redis."""
    (tmp_path / "data_in").mkdir()
    (tmp_path / "data_out").symlink_to("data_in")  # what one side sends the other reads
    environment = {
        "BROKER": "filesystem://",
        "RESULTS": (tmp_path / "results").as_uri(),
        "PYTHONPATH": f"{ROOT}:{RECIPES}",
    }
    (tmp_path / "results").mkdir()
    return lambda *command: serve(*command, env=environment, cwd=tmp_path)


@needs("celery")
@pytest.mark.long
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_every_task_is_answered(run: Run, pool: str) -> None:
    """Tasks in forked processes would hang, or those in threads would fail beside each other."""
    worker = run("-m", "celery", "-A", "celery_app", "worker", "--pool", pool, "--concurrency", "2", "-l", "INFO")
    worker.until(" ready.")
    asking = run("-c", ASK)
    asking.until("refused: InvalidRequestError")
    answers = json.loads(asking.output.splitlines()[0])
    assert answers == [f"{n} + {n} = {2 * n}." for n in range(1, 9)]
    worker.stop()
    assert "was not closed" not in worker.output, worker.output
