"""The rooms: what lmbridge's folders import of each other, and which thread runs them.

Rule: the arrows are read in the source. Written here is only what no source says: which modules stand together, and
whose thread runs them. A module that is in no room stops the build.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pictures.svg import FILLS, Picture

ALT = "Which folders of lmbridge import which, from the commands at the top to plain data at the bottom: "


@dataclass(frozen=True)
class Room:
    """Modules that are drawn as one box; ``thread`` is its colour."""

    name: str
    modules: tuple[str, ...]
    what: str
    thread: str


ROOMS = (
    Room("cli/", ("cli", "__main__"), "the command", "caller"),
    Room("flask/", ("flask",), "apps, routes, page", "caller"),
    Room("testing/", ("testing",), "scripted engine, contracts", "caller"),
    Room("prometheus", ("prometheus",), "metrics, exported", "caller"),
    Room("compat/", ("compat",), "LMDeploy's pipeline", "caller"),
    Room("replica", ("replica",), "a bridge on Ray", "caller"),
    Room("bridge, client, chat", ("bridge", "client", "chat", "rounds"), "what users hold", "caller"),
    Room("caller/", ("caller",), "check, send, wait, read", "caller"),
    Room("server/", ("server",), "the loop, turns, the engine's life", "server"),
    Room("crossing/", ("crossing",), "calls, queues, gate, bell", "crossing"),
    Room("device/", ("device",), "turns and memory of a GPU", "crossing"),
    Room("engines/", ("engines",), "the contract, and each engine", "engine"),
    Room(
        "plain data",
        ("messages", "generation", "grammar", "tools", "signatures", "errors", "values", "metrics", "log"),
        "messages, generation, tools, errors, metrics, …",
        "crossing",
    ),
)
THREADS = {
    "caller": "callers' threads",
    "crossing": "any thread",
    "server": "the server thread",
    "engine": "the server thread and the engine's own",
}
Graph = dict[str, set[str]]  # a room's name to those that it imports
WIDTH, HEIGHT, GAP, LEVEL = 770, 46, 12, 86


def draw(package: Path) -> str:
    graph = _essential(_imports(package))
    levels = _levels(graph)
    alt = ALT + "; ".join(f"{name} imports {', '.join(sorted(graph[name]))}" for name in graph if graph[name]) + "."
    picture = Picture(WIDTH, 10 + LEVEL * len(levels), alt)
    places = _places(levels, graph)
    for name, imported in graph.items():
        for other in sorted(imported):
            _arrow(picture, places[name], places[other])
    for room in ROOMS:
        x, y, width = places[room.name]
        picture.box(x, y, width, HEIGHT, room.thread)
        picture.text(x + width / 2, y + 19, room.name, style="bold mono")
        picture.text(x + width / 2, y + 36, room.what, size=11)
    _legend(picture, 10 + LEVEL * len(levels) - 20)
    return str(picture)


def _imports(package: Path) -> Graph:
    """Who imports whom, types included.

    Raises:
        LookupError: a module is in no room.
    """
    room_of = {module: room.name for room in ROOMS for module in room.modules}
    graph: Graph = {room.name: set() for room in ROOMS}
    for file in sorted(package.rglob("*.py")):
        module = file.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        if module not in room_of:
            raise LookupError(f"docs/pictures/rooms.py does not know lmbridge/{module}; put it into one of its ROOMS.")
        found = {room_of[name] for name in _imported(file) if name in room_of}
        graph[room_of[module]] |= found - {room_of[module]}
    return graph


def _imported(file: Path) -> Iterator[str]:
    """The first part below ``lmbridge`` of what a file imports."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("lmbridge."))


def _reach(graph: Graph, name: str) -> set[str]:
    """What a room imports, and what that does, and so on."""
    return graph[name].union(*(_reach(graph, other) for other in graph[name]))


def _essential(graph: Graph) -> Graph:
    """Without the arrows that others imply; raises RecursionError where rooms import each other in a circle."""
    return {
        name: {other for other in imported if not any(other in _reach(graph, via) for via in imported - {other})}
        for name, imported in graph.items()
    }


def _levels(graph: Graph) -> list[list[str]]:
    """The rooms from the top down; each stands above all that it imports, in the order of ``ROOMS``."""
    height: dict[str, int] = {}
    while len(height) < len(graph):
        for name, imported in graph.items():
            if imported <= height.keys():
                height[name] = 1 + max((height[other] for other in imported), default=-1)
    top = max(height.values())
    return [[name for name in graph if height[name] == level] for level in range(top, -1, -1)]


def _places(levels: list[list[str]], graph: Graph) -> dict[str, tuple[float, float, float]]:
    """Each room's left, top and width; one that is alone on its level stands above what it imports."""
    places: dict[str, tuple[float, float, float]] = {}
    for row, names in reversed(list(enumerate(levels))):
        width = min(300.0, (WIDTH - GAP * (len(names) + 1)) / len(names))
        middles = [places[other][0] + places[other][2] / 2 for name in names for other in graph[name]]
        middle = sum(middles) / len(middles) if middles and len(names) == 1 else WIDTH / 2
        left = middle - (len(names) * width + (len(names) - 1) * GAP) / 2
        for column, name in enumerate(names):
            places[name] = (left + column * (width + GAP), 4.0 + row * LEVEL, width)
    return places


def _arrow(picture: Picture, start: tuple[float, float, float], end: tuple[float, float, float]) -> None:
    (x0, y0, width0), (x1, y1, width1) = start, end
    from_middle, to_middle = x0 + width0 / 2, x1 + width1 / 2
    lean = max(-0.4, min(0.4, (to_middle - from_middle) / WIDTH))
    picture.line((from_middle + lean * width0, y0 + HEIGHT), (to_middle - lean * width1, y1 - 1))


def _legend(picture: Picture, y: float) -> None:
    x = 12.0
    for kind in FILLS:
        if kind in THREADS:
            picture.box(x, y, 16, 16, kind, rounded=3)
            picture.text(x + 23, y + 13, THREADS[kind], size=12, anchor="start")
            x += 50 + 7 * len(THREADS[kind])
