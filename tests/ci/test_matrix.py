"""The matrix of engines and checks says what the runs said."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / ".ci" / "matrix.py"
if not FILE.exists():
    pytest.skip("an installed copy of the tests has no .ci", allow_module_level=True)


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(path: Path, engine: str, outcomes: dict[str, str]) -> Path:
    cases = "".join(
        f'<testcase classname="tests.engines.test_contract.Test{engine}Engine" name="{name}">{inside}</testcase>'
        for name, inside in outcomes.items()
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def test_each_cell(tmp_path: Path, matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Passed, skipped with its reason, failed and not run stand where they belong, and a failure fails the command."""
    passed = dict.fromkeys(matrix.GENERATING, "")
    good = report(tmp_path / "good.xml", "Good", {**passed, "test_a_tool_is_called": '<skipped message="no tools"/>'})
    assert matrix.main([str(good)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["Good"]
    cells = {line[: -len("passed")].strip() for line in table if line.endswith("passed")}
    assert cells == {name.removeprefix("test_").replace("_", " ") for name in matrix.GENERATING} - {"a tool is called"}
    assert [line.split()[-1] for line in table if line.startswith("a tool is called")] == ["(1)"]
    assert "(1) skipped: no tools" in table

    bad = report(tmp_path / "bad.xml", "Bad", {**passed, "test_answers_do_not_mix": "<failure/>"})
    assert matrix.main([str(good), str(bad)]) == 1
    assert any(line.split()[-2:] == ["FAILED", "passed"] for line in capsys.readouterr().out.splitlines())

    part = report(tmp_path / "part.xml", "Part", {"test_answers_do_not_mix": ""})
    assert matrix.main([str(part)]) == 1
    assert matrix.main([]) == 1


def test_jobs_have_a_table_of_their_own(tmp_path: Path, matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that embeds is held to its own contract, not to that of texts."""
    texts = report(tmp_path / "texts.xml", "Texts", dict.fromkeys(matrix.GENERATING, ""))
    jobs = report(tmp_path / "jobs.xml", "Jobs", dict.fromkeys(matrix.WORKING, ""))
    assert matrix.main([str(texts), str(jobs)]) == 0
    headings = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert headings == [["Texts"], ["Jobs"]]
