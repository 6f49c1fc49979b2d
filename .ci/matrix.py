"""Which engine passes which check of its contract, from the reports of pytest's runs: ``matrix.py REPORT.xml …``.

Rule: reads files and prints a table; a check that failed, or an engine that did not run, makes the exit status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from lmbridge.testing import EngineContract, JobContract

PASSED, FAILED = "passed", "FAILED"

Matrix = dict[str, dict[str, str]]
"""Engine to check to what came of it: ``passed``, ``FAILED``, or why it was skipped."""


def checks_of(contract: type) -> list[str]:
    """The names of a contract's tests."""
    return [name for name in vars(contract) if name.startswith("test_")]


GENERATING, WORKING = checks_of(EngineContract), checks_of(JobContract)
"""Of engines that generate text, and of those that embed, rerank or call."""


def main(paths: list[str]) -> int:
    matrix = read([Path(path) for path in paths])
    jobs = {engine: cells for engine, cells in matrix.items() if set(cells) & (set(WORKING) - set(GENERATING))}
    texts = {engine: cells for engine, cells in matrix.items() if engine not in jobs}
    print("\n".join([*written(texts, GENERATING), "", *written(jobs, WORKING)]))
    whole = is_whole(texts, GENERATING) and is_whole(jobs, WORKING)
    return 0 if matrix and whole else 1


def is_whole(matrix: Matrix, checks: Sequence[str]) -> bool:
    """Whether every check ran for every engine, and none failed."""
    return all(set(cells) >= set(checks) and FAILED not in cells.values() for cells in matrix.values())


def read(paths: Iterable[Path]) -> Matrix:
    """What all reports say; of a check that ran more than once the worst."""
    matrix: Matrix = {}
    known = {*GENERATING, *WORKING}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            name, engine = case.get("name", ""), _engine(case.get("classname", ""))
            if name in known and engine:
                cells = matrix.setdefault(engine, {})
                outcome = _outcome(case)
                cells[name] = outcome if cells.get(name) != FAILED else FAILED
    return matrix


def written(matrix: Matrix, checks: Sequence[str]) -> Iterator[str]:
    """A line for each check, a column for each engine, and the reasons of what was skipped."""
    engines = sorted(matrix)
    reasons = _reasons(matrix)
    first = max(map(len, checks)) - len("test_")
    widths = [max(len(engine), len(FAILED)) for engine in engines]
    yield " ".join([" " * first, *(f"{engine:<{width}}" for engine, width in zip(engines, widths, strict=True))])
    for check in checks:
        cells = [_cell(matrix[engine].get(check, "not run"), reasons) for engine in engines]
        row = [f"{check.removeprefix('test_').replace('_', ' '):<{first}}"]
        yield " ".join([*row, *(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))]).rstrip()
    for reason, number in reasons.items():
        yield f"({number}) skipped: {reason}"


def _engine(classname: str) -> str:
    """``TestVLLMEngine`` is the column ``VLLM``; the contract's own tests of wrong engines are none."""
    name = classname.rpartition(".")[2]
    return name.removeprefix("Test").removesuffix("Engine") if name.startswith("Test") else ""


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return FAILED
    skipped = case.find("skipped")
    return PASSED if skipped is None else skipped.get("message", "no reason")


def _reasons(matrix: Matrix) -> Mapping[str, int]:
    said = {cell for cells in matrix.values() for cell in cells.values()} - {PASSED, FAILED}
    return {reason: number for number, reason in enumerate(sorted(said), 1)}


def _cell(outcome: str, reasons: Mapping[str, int]) -> str:
    return f"({reasons[outcome]})" if outcome in reasons else outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
