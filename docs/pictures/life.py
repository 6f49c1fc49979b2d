"""A request's life, thread by thread: time runs downwards.

Rule: the order of the steps is written here; that the modules which take them exist is looked up.
"""

from __future__ import annotations

from pathlib import Path

from pictures.svg import Picture

ALT = (
    "A request's life: the caller's thread checks the prompt, takes a place at the gate, puts the request into its "
    "requests queue and rings the doorbell. The server thread takes it in, lets it wait for its turn and hands it to "
    "the engine. Each step of the engine gives a delta, which the server thread keeps and announces by a token in the "
    "replies queue; the caller's thread wakes and reads. A deadline, break, Ctrl-C or a lost client has the server "
    "thread abort the request on the engine."
)
LANES = {"caller": ("caller's thread", 100), "crossing": ("its pair of queues", 285), "server": ("server thread", 475),
         "engine": ("engine", 665)}  # fmt: skip
WIDTH, ROW, TOP = 770, 44, 62

STEPS: list[tuple[str, str, str, str]] = [
    # from, to (the same: something done there), what, by which module
    ("caller", "caller", "infer(prompt, timeout=30)", "caller/requests.py"),
    ("caller", "caller", "a place at the gate", "crossing/gate.py"),
    ("caller", "crossing", "put: requests", "crossing/channel.py"),
    ("caller", "server", "ring, once for all", "crossing/doorbell.py"),
    ("crossing", "server", "taken in", "server/inbox.py"),
    ("server", "server", "waits for its turn", "server/turns.py"),
    ("server", "engine", "add_request", "server/calls.py"),
    ("engine", "server", "a delta each step", "engines/base.py"),
    ("server", "crossing", "put: replies", "server/calls.py"),
    ("crossing", "caller", "wakes, reads on", "crossing/wake_chain.py"),
    ("engine", "server", "the last delta", "engines/base.py"),
    ("server", "server", "one outcome is settled", "crossing/call.py"),
    ("server", "crossing", "put: replies", "server/calls.py"),
    ("crossing", "caller", "Response, or one error", "caller/answer.py"),
]
STATES = [("checked", 0, 2), ("waiting", 2, 6), ("running", 6, 11), ("ended", 11, 14)]  # from step, to step
REPEATED = (7, 10)  # steps that come again with each of the engine's


def draw(package: Path) -> str:
    picture = Picture(WIDTH, TOP + ROW * (len(STEPS) + 4) - 10, ALT)
    bottom = TOP + ROW * len(STEPS) - 14
    for kind, (name, x) in LANES.items():
        picture.box(x - 78, 8, 156, 30, kind)
        picture.text(x, 28, name, style="bold")
        _lane(picture, kind, x)
    for name, first, last in STATES:
        middle = TOP + ROW * (first + last) / 2 - 8
        picture.text(WIDTH - 6, middle, name, anchor="end", style="bold")
        picture.line((WIDTH - 58, TOP + ROW * last - 18), (WIDTH, TOP + ROW * last - 18), head=False, dashed=True)
    for row, step in enumerate(STEPS):
        _step(picture, package, row, *step)
    _again(picture)
    _stopped(picture, bottom + 18)
    return str(picture)


def _lane(picture: Picture, kind: str, x: float) -> None:
    """The line of a thread, which leaves out the boxes of what is done there."""
    start = 38.0
    for row in [row for row, step in enumerate(STEPS) if step[0] == step[1] == kind]:
        if TOP + ROW * row - 8 > start:
            picture.line((x, start), (x, TOP + ROW * row - 8), kind=kind, head=False)
        start = TOP + ROW * row + 28
    picture.line((x, start), (x, TOP + ROW * len(STEPS) + 4), kind=kind, head=False)


def _step(picture: Picture, package: Path, row: int, start: str, end: str, what: str, module: str) -> None:
    if not (package / module).is_file():
        raise FileNotFoundError(f"docs/pictures/life.py shows {module}, which lmbridge no longer has.")
    y = TOP + ROW * row + 10
    x0, x1 = LANES[start][1], LANES[end][1]
    if start == end:
        picture.box(x0 - 93, y - 18, 186, 36, start)
        picture.text(x0, y - 2, what)
        picture.text(x0, y + 12, module, size=10, style="mono faint")
        return
    picture.line((x0, y + 2), (x1 - 3 if x1 > x0 else x1 + 3, y + 2), dashed=abs(x1 - x0) > 200)
    middle = (x0 + x1) / 2 if abs(x1 - x0) < 200 else x0 + 95
    picture.text(middle, y - 4, what)
    picture.text(middle, y + 14, module, size=10, style="mono faint")


def _again(picture: Picture) -> None:
    first, last = REPEATED
    x, y0, y1 = LANES["engine"][1] + 14, TOP + ROW * first + 2, TOP + ROW * (last - 1) + 16
    picture.line((x, y1), (x + 16, y1), (x + 16, y0), (x + 2, y0))
    picture.text(x + 8, y1 + 15, "again", size=11, anchor="start", style="faint")


def _stopped(picture: Picture, y: float) -> None:
    caller, server, engine = LANES["caller"][1], LANES["server"][1], LANES["engine"][1]
    picture.box(4, y, WIDTH - 8, 2.7 * ROW, "stop")
    picture.text(14, y + 20, "At any moment before the end:", anchor="start", style="bold")
    picture.text(14, y + 38, "deadline, break, Ctrl-C, close(), Future.cancel(), abort(id), a client that has gone",
                 anchor="start")  # fmt: skip
    y += 66
    picture.line((caller, y), (server - 3, y), kind="stop")
    picture.text((caller + server) / 2, y - 6, "the caller goes at once, and rings")
    picture.line((server, y), (engine - 3, y), kind="stop")
    picture.text((server + engine) / 2, y - 6, "abort_request")
    picture.line((engine, y + 32), (server + 3, y + 32), kind="stop")
    picture.text((server + engine) / 2, y + 26, "let go within 2 steps")
    picture.text((caller + server) / 2, y + 26, "its place goes to the next one")
