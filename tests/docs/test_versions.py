"""docs/versions.rst says what setup.cfg allows and what the engines were tried with."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement

from lmbridge.engines import ENGINES, engine_class

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "versions.rst").read_text("utf-8")
SETUP = configparser.RawConfigParser()
SETUP.read(ROOT / "setup.cfg", "utf-8")


def test_every_engine_is_there_with_what_was_tried() -> None:
    """Whoever looks up whether a version was tried would read of an older engine."""
    shown = set(re.findall(r"^``(\w+)`` +``([\w-]+)`` +(.+?)$", PAGE, re.MULTILINE))
    libraries = {(name, library) for name in ENGINES for library in engine_class(name).libraries}
    assert shown == {(name, library.package, library.tried) for name, library in libraries}


def test_bounds_are_those_of_setup_cfg() -> None:
    """The page would allow a version that pip refuses, or the other way round."""
    shown = dict(re.findall(r"^``([\w-]+)`` +([<>][<>=\d., ]*\d)", PAGE, re.MULTILINE))
    needed = [Requirement(line) for line in SETUP["options"]["install_requires"].split("\n") if line]
    allowed = {each.name: each.specifier for each in needed}
    assert {name: Requirement(f"{name}{bounds}").specifier for name, bounds in shown.items()} == {
        name: allowed[name] for name in shown
    }
    assert {name for name, specifier in allowed.items() if "<" in str(specifier)} <= set(shown)


def test_each_python_is_there() -> None:
    """A Python that setup.cfg names would be missing, or one named that it does not."""
    classifiers = SETUP["metadata"]["classifiers"]
    named = re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert re.findall(r"^(3\.\d+) ", PAGE, re.MULTILINE) == named
    assert SETUP["options"]["python_requires"] == f">= {named[0]}"
