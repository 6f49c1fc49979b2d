"""What ``.ci/run`` makes of setup.cfg's bounds and of what the package index offers."""

from __future__ import annotations

import doctest
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

FILE = Path(__file__).parents[2] / ".ci" / "versions.py"
BOUND = {"janus": SpecifierSet(">= 2.0, < 2.1"), "transformers": SpecifierSet(">= 5.24, < 5.26")}
if not FILE.exists():
    pytest.skip("an installed copy of the tests has no .ci", allow_module_level=True)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


versions: Any = load()


def choice(janus: str, transformers: str) -> dict[str, Version]:
    return {"janus": Version(janus), "transformers": Version(transformers)}


def offers(janus: str, transformers: str) -> dict[str, list[Version]]:
    """Of space-separated versions."""
    return {"janus": [*map(Version, janus.split())], "transformers": [*map(Version, transformers.split())]}


def test_setup_cfg_bounds_both_from_both_sides() -> None:
    """Without an upper bound, a user's pip picks a version that nobody has run."""
    bound = versions.bounds(versions.SETUP.read_text())
    assert set(bound) == set(versions.BOUNDED)
    assert all({each.operator for each in specifiers} == {">=", "<"} for specifiers in bound.values())


def test_what_was_run_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of .ci/run would otherwise take minutes longer for nothing."""
    versions.look(choice("2.0.0", "5.24.0"), offers("1.2.0 2.0.0", "5.23.0 5.24.0"), BOUND)
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == "What was run (janus==2.0.0 transformers==5.24.0) is the oldest and the newest that setup.cfg allows.\n"
    )


def test_the_oldest_allowed_is_run_beside_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    """A user whose environment holds an older version back would be the first to run it."""
    versions.look(choice("2.0.0", "5.25.1"), offers("1.2.0 2.0.0", "5.23.0 5.24.0 5.25.1"), BOUND)
    out, err = capsys.readouterr()
    assert out == "oldest janus==2.0.0 transformers==5.24.0\n"
    assert "is the newest that" in err


def test_both_ends_are_run_where_neither_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Another package of the environment may hold back what the suite ran with."""
    versions.look(choice("2.0.0", "5.24.1"), offers("2.0.0 2.0.1", "5.24.0 5.24.1 5.25.0"), BOUND)
    assert capsys.readouterr().out.splitlines() == [
        "oldest janus==2.0.0 transformers==5.24.0",
        "newest janus==2.0.1 transformers==5.25.0",
    ]


def test_one_environment_where_only_one_version_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    """The same environment must not be built twice."""
    versions.look(choice("2.0.0", "5.24.0.dev0"), offers("2.0.0", "5.24.0"), BOUND)
    assert capsys.readouterr().out == "oldest janus==2.0.0 transformers==5.24.0\n"


def test_a_newer_one_than_allowed_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody would hear of a release that users cannot have yet."""
    versions.look(choice("2.0.0", "5.24.0"), offers("2.0.0 2.1.0", "5.24.0 5.26.0"), BOUND)
    out, err = capsys.readouterr()
    assert out == ""
    assert "WARNING: the index has janus 2.1.0; setup.cfg allows <2.1,>=2.0." in err
    assert "WARNING: the index has transformers 5.26.0" in err


def test_an_index_without_anything_allowed_is_a_failure() -> None:
    """Bounds with a slip in them would leave nothing to install."""
    with pytest.raises(SystemExit, match=r"nothing that setup\.cfg allows of transformers"):
        versions.look(choice("2.0.0", "5.24.0"), offers("2.0.0", "5.26.0"), BOUND)


def test_examples() -> None:
    """The examples in its docstrings hold."""
    assert doctest.testmod(versions) == (0, 1)


def test_the_index_answers() -> None:
    """What pip prints has changed its form: no version would be found, and .ci/run would end here."""
    try:
        found = versions.offered("janus")
    except (ConnectionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no package index here: {str(error)[:200]}")
    assert Version("2.0.0") in found
    assert found == sorted(found)
