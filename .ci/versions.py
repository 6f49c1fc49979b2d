"""Which versions of the packages that setup.cfg bounds are still to be run.

Rule: looks and prints, installs nothing. Run by the interpreter of the environment that ran the suite.

A line on stdout for each further environment: its name and what pip has to install there, such as ``oldest
janus==2.0.0 transformers==5.24.0``. Warnings, and what need not be run, go to stderr.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

BOUNDED = ("janus", "transformers")
SETUP = Path(__file__).parents[1] / "setup.cfg"
Choice = dict[str, Version]  # of each package, the version that an environment has


def bounds(setup: str) -> dict[str, SpecifierSet]:
    """What the text of a setup.cfg allows of each bounded package."""
    config = configparser.RawConfigParser()
    config.read_string(setup)
    lines = config["options"]["install_requires"].splitlines()
    required = [Requirement(line) for line in lines if line]
    return {each.name: each.specifier for each in required if each.name in BOUNDED}


def parse_index(said: str) -> list[Version]:
    """The versions that ``pip index versions`` prints.

    >>> parse_index("janus (2.0.0)\\nAvailable versions: 2.0.0, 1.2.0\\n  LATEST:    2.0.0")
    [<Version('1.2.0')>, <Version('2.0.0')>]
    """
    found = re.search(r"^Available versions: (.+)$", said, re.MULTILINE)
    return sorted(map(Version, found[1].split(", "))) if found else []


def offered(name: str) -> list[Version]:
    """The versions of a package that the index offers to this interpreter, oldest first; no pre-releases.

    Raises:
        ConnectionError: pip gets no answer, or the index has no such package.
        ValueError: pip's answer has another form than it had.
    """
    asked = [sys.executable, "-m", "pip", "index", "versions", "--timeout", "15", "--retries", "1", name]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=90, check=False)
    if done.returncode:
        raise ConnectionError(f"pip finds no version of {name}: {done.stderr.strip()}")
    if not (versions := parse_index(done.stdout)):
        raise ValueError(f"pip's answer about {name} names no versions: {done.stdout.strip()}")
    return versions


def ends(allowed: Mapping[str, list[Version]]) -> dict[str, Choice]:
    """The oldest and the newest environment that is allowed, by those names."""
    return {
        "oldest": {name: versions[0] for name, versions in allowed.items()},
        "newest": {name: versions[-1] for name, versions in allowed.items()},
    }


def newer(offers: Mapping[str, list[Version]], bound: Mapping[str, SpecifierSet]) -> Choice:
    """The newest version of each package of which the index has one above what setup.cfg allows."""
    return {name: versions[-1] for name, versions in offers.items() if versions[-1] not in bound[name]}


def pins(choice: Choice) -> str:
    return " ".join(f"{name}=={version}" for name, version in choice.items())


def look(installed: Choice, offers: Mapping[str, list[Version]], bound: Mapping[str, SpecifierSet]) -> None:
    """Print what is to be run and what is not.

    Raises:
        SystemExit: the index has nothing that setup.cfg allows.
    """
    allowed = {name: list(bound[name].filter(versions)) for name, versions in offers.items()}
    if empty := [f"{name} {bound[name]}" for name, versions in allowed.items() if not versions]:
        raise SystemExit(f"The package index has nothing that setup.cfg allows of {', '.join(empty)}.")
    for name, version in newer(offers, bound).items():
        note(f"WARNING: the index has {name} {version}; setup.cfg allows {bound[name]}. Try it, and widen the bound.")
    choices = ends(allowed)
    if same := [name for name, choice in choices.items() if choice == installed]:
        note(f"What was run ({pins(installed)}) is the {' and the '.join(same)} that setup.cfg allows.")
    if choices["oldest"] == choices["newest"]:
        del choices["newest"]
    for name, choice in choices.items():
        if choice != installed:
            print(name, pins(choice))


def note(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    bound = bounds(SETUP.read_text())
    installed = {name: Version(importlib.metadata.version(name)) for name in bound}
    look(installed, {name: offered(name) for name in bound}, bound)


if __name__ == "__main__":
    main()
