"""Shows the demo's threads side by side: live panels in a terminal, plain lines anywhere else.

Rule: reads turns, never changes them. ``Screen.grew`` is called on the asking threads, everything else on the main
thread.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from lmbridge.cli.terminal import is_terminal, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

LINE = 80  # characters per plain line, the thread's name included
SMALLEST = (60, 16)  # columns and rows below which panels cannot be read


class ShownTurn(Protocol):
    """What a view needs to know about one question and its answer."""

    thread: str
    prompt: str
    state: str
    text: str


class Screen(Protocol):
    """One round of questions on display."""

    def grew(self, turn: ShownTurn, text: str, /) -> None:
        """Show that the answer grew by ``text``; a line end comes last."""


class View(Protocol):
    """The demo's display."""

    def screen(
        self, title: str, turns: Sequence[ShownTurn], passing: bool = False
    ) -> contextlib.AbstractContextManager[Screen]:
        """Show a round of questions while the context lasts; a ``passing`` one disappears afterwards."""

    def say(self, line: str) -> None:
        """Show one line of text."""


def choose_view() -> View:
    """Panels if stdout is a terminal that can show them, else plain lines."""
    if is_terminal(sys.stdout):
        from rich.console import Console

        console = Console()
        columns, rows = console.size
        if not console.is_dumb_terminal and columns >= SMALLEST[0] and rows >= SMALLEST[1]:
            return PanelView(console)
    return PlainView()


class PlainView:
    """Each thread prints its own answer line by line, each line after the thread's name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unfinished: dict[str, str] = {}  # per thread, what it has not printed yet; guarded by _lock

    @contextlib.contextmanager
    def screen(self, title: str, turns: Sequence[ShownTurn], passing: bool = False) -> Iterator[Screen]:
        self.say(f"\n{title}.")
        if not passing:
            for turn in turns:
                self._print(turn, f"? {turn.prompt}")
        yield self

    def say(self, line: str) -> None:
        print(printable(line), flush=True)

    def grew(self, turn: ShownTurn, text: str) -> None:
        with self._lock:
            lines, rest = fill(self._unfinished.get(turn.thread, "") + text, LINE - len("thread 10 > "))
            self._unfinished[turn.thread] = rest
            for line in lines:
                self._print(turn, f"> {line}")

    def _print(self, turn: ShownTurn, line: str) -> None:
        self.say(f"{turn.thread:9} {line}")


def fill(text: str, width: int) -> tuple[list[str], str]:
    """Break text at spaces; return the complete lines, of at most ``width`` characters, and the rest."""
    *ended, rest = text.split("\n")
    lines: list[str] = []
    for paragraph in ended:
        full, last = _wrap(paragraph, width)
        lines += [*full, last] if last else full
    full, rest = _wrap(rest, width)
    return lines + full, rest


def _wrap(paragraph: str, width: int) -> tuple[list[str], str]:
    lines = []
    while len(paragraph) > width:
        blank = paragraph.rfind(" ", 1, width + 1)
        end = blank if blank > 0 else width
        lines.append(paragraph[:end])
        paragraph = paragraph[end:].lstrip(" ")
    return lines, paragraph


class PanelView:
    """A panel for each thread, all filling at the same time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def screen(self, title: str, turns: Sequence[ShownTurn], passing: bool = False) -> Iterator[Screen]:
        from rich.live import Live

        panels = Panels(title, turns, self._console.height)
        with Live(panels, console=self._console, refresh_per_second=10, transient=passing):
            yield panels

    def say(self, line: str) -> None:
        self._console.print(printable(line), highlight=False, markup=False)


class Panels:
    """A grid of panels; draws the current state of the turns."""

    def __init__(self, title: str, turns: Sequence[ShownTurn], height: int) -> None:
        self._title = title
        self._turns = turns
        self._columns = 2 if len(turns) <= 8 else 4
        rows = -(-len(turns) // self._columns)
        self._height = max(3, min(6, (height - 3) // rows))  # of a panel, borders included

    def grew(self, turn: ShownTurn, text: str) -> None:
        pass  # the next drawing shows it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        width = options.max_width // self._columns
        grid = Table.grid()
        for _ in range(self._columns):
            grid.add_column(width=width)
        for first in range(0, len(self._turns), self._columns):
            row = self._turns[first : first + self._columns]
            grid.add_row(*(self._panel(console, turn, width) for turn in row))
        yield Text(f"{self._title}:", style="bold")
        yield grid

    def _panel(self, console: Console, turn: ShownTurn, width: int) -> RenderableType:
        from rich.panel import Panel
        from rich.text import Text

        style = {"waiting": "dim", "answering": "cyan", "done": "green"}.get(turn.state, "red")
        title = Text(f"{turn.thread.removeprefix('thread ')} {turn.prompt}")
        title.truncate(width - 6, overflow="ellipsis")
        body = tail(console, Text(printable(turn.text) or turn.state), width - 4, self._height - 2)
        return Panel(body, title=title, title_align="left", border_style=style, height=self._height)


def tail(console: Console, text: Text, width: int, height: int) -> Text:
    """The last lines of ``text`` that fit."""
    from rich.text import Text

    return Text("\n").join(list(text.wrap(console, width))[-height:])
